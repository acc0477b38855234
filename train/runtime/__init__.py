"""The machine, its processes, random state, signals, and files: what knows nothing of training."""
