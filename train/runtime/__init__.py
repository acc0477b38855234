"""Devices, processes, threads, random state, signals and files: modules that know nothing of training."""
