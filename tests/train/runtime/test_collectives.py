"""The mean over processes as an autograd Function; test_together.py has its values. The name of a start."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
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


def test_the_processes_of_a_start_agree_on_a_name_whatever_an_earlier_one_left_in_the_store() -> None:
    store, time = torch.distributed.HashStore(), timedelta(minutes=10)
    names = []
    for late in (0, 1, 2):
        with ThreadPoolExecutor() as pool:
            ranks = [*(rank for rank in range(3) if rank != late), late]
            found = list(pool.map(lambda rank: collectives._name_of_this_start(store, rank, 3, time), ranks))
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3


def test_a_process_that_does_not_start_is_named() -> None:
    store = torch.distributed.HashStore()
    with pytest.raises(TimeoutError, match=r"waited 0:00:00 for processes \[1\] of 2 to start"):
        collectives._name_of_this_start(store, 0, 2, timedelta())
