"""Shared by all tests: few threads, so that parallel runs and small machines behave alike."""

import torch

torch.set_num_threads(2)
