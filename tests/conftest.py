"""Shared by all tests: few threads and no limit of time, so that parallel runs and busy machines behave alike."""

import os
import sys

# Threads that wait for work let those run that have some. PyTorch's read it when they are loaded; children inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # For tests/kernels: Triton reads it when it is imported, and when a kernel is defined.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py: set TRITON_INTERPRET=1 outside")
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)

# An example that takes long says that the machine is busy, not that the code is wrong.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# Up to two minutes each: a file is one process's, so the other process has the rest meanwhile, if these come first.
LONGEST = ("train/jobs/test_train.py", "train/test_together.py", "train/loop/test_cuda_graph.py", "faults/test_kill.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others keep their order."""
    items.sort(key=lambda item: next((n for n, end in enumerate(LONGEST) if item.path.match(end)), len(LONGEST)))
