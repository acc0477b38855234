"""Shared by all tests: few threads, so that parallel runs and small machines behave alike."""

import os

# Threads that wait for work let those run that have some. PyTorch's read it when they are loaded; children inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(2)
