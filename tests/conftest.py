"""Shared by all tests: few threads, so that parallel runs and small machines behave alike."""

import os
import sys

# Threads that wait for work let those run that have some. PyTorch's read it when they are loaded; children inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # For tests/kernels: Triton reads it when it is imported, and when a kernel is defined.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py: set TRITON_INTERPRET=1 outside")
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)
