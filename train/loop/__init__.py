"""The epochs of a run: its state, its steps, when it is evaluated and saved."""
