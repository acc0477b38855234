"""Training: a whole step, whole runs on CIFAR, losses on digits."""
