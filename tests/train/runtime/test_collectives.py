"""The mean over processes as an autograd Function; test_together.py has its values."""

from types import SimpleNamespace

import pytest
import torch

from rcl_fast.train.runtime import distributed as collectives


def test_the_mean_is_no_tensor_that_was_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/rcl_fast/test_autograd_functions.py says of the library's Functions, and why."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total)
    context = SimpleNamespace(save_for_backward=lambda *_: None)
    mean = collectives._AllReduceMean.forward(context, torch.tensor(3.0), torch.tensor(2.0))
    assert mean == 3
    assert mean._version == 0
