"""The kernels' custom autograd Functions keep to what tests/rcl_fast/test_autograd_functions.py says of all others."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from batches import loss_and_gradients, random_batch

from rcl_fast.backends import triton as backend

sys.path.append(str(Path(__file__).parents[1] / "rcl_fast"))

from test_autograd_functions import KERNELS, Changed, counting, name_of


def test_no_forward_pass_returns_a_tensor_that_it_changed_in_place(device: torch.device) -> None:
    ours = [one for one in torch.autograd.Function.__subclasses__() if one.__module__ == KERNELS]
    batch = random_batch(device, 30, 11, 16)
    changed: Changed = {}
    with counting(ours, changed):
        loss_and_gradients(backend.losses, batch)
    assert changed == {name_of(one): 0 for one in ours}
