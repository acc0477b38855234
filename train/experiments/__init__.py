"""The paper's tables and figure 3 as runs: which runs there are, their results, and the tables made of these."""
