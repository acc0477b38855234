"""The paper's tables and figure 3 as runs: which there are, what each gave, and how that is shown."""
