"""What lies in runs/NAME besides results: checkpoints, status, logs, restarts."""
