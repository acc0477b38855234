"""What every custom autograd Function keeps to, so that torch.compile traces it right.

PyTorch 2.11's compiler hands a Function a zero grad_output where its forward pass returns a tensor that it changed in
place: the loss is right, every gradient 0, and nothing says so. Each tensor counts its in-place changes, so that every
version of PyTorch shows the fault.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import draw_case
from processes import Processes
from torch.distributed import ProcessGroup

import rcl_fast
from rcl_fast import contrastive_loss
from rcl_fast.autograd import _Product, product

Changed = dict[str, int]
"""In-place changes of what a Function's forward pass returned, the most of any output, by the Function's name."""

KERNELS = "rcl_fast.backends.triton"  # tests/kernels has those: they need the interpreter, or a GPU
TRAINER = "rcl_fast.train"  # and tests/train those: the loss is tested without the trainer's packages


def functions() -> list[type]:
    """Every custom Function of the library, but for the kernels'."""
    elsewhere = (KERNELS, TRAINER)
    for module in pkgutil.iter_modules(rcl_fast.__path__, "rcl_fast."):
        if not module.name.startswith((TRAINER, "rcl_fast.kernels")):
            import_module(module.name)
    ours = (one for one in torch.autograd.Function.__subclasses__() if one.__module__.startswith("rcl_fast."))
    return [one for one in ours if not one.__module__.startswith(elsewhere)]


def name_of(function: type) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@contextmanager
def counting(watched: list[type], changed: Changed) -> Iterator[None]:
    """Note what the Functions return from here on."""
    originals = {one: one.forward for one in watched}

    def noting(one: type) -> Any:
        def forward(*arguments: Any) -> Any:
            outputs = originals[one](*arguments)
            tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            versions = [tensor._version for tensor in tensors if tensor is not None]
            changed[name_of(one)] = max(changed.get(name_of(one), 0), *versions)
            return outputs

        return staticmethod(forward)

    for one in watched:
        one.forward = noting(one)
    try:
        yield
    finally:
        for one, forward in originals.items():
            one.forward = staticmethod(forward)


def changes_of_all(group: ProcessGroup) -> Changed:
    """Of each Function that there is, as users reach it."""
    changed: Changed = {}
    with counting(functions(), changed):
        for reduction in ("mean", "none"):
            for options in ({"backend": "dense"}, {"backend": "tiled"}, {"backend": "tiled", "group": group}):
                case = draw_case(40, 8, class_average=True, normalize=reduction == "mean")
                loss = contrastive_loss(**case, reduction=reduction, **options)
                torch.autograd.grad(loss.sum(), case["features"], create_graph=True)
    return changed


def test_no_forward_pass_returns_a_tensor_that_it_changed_in_place(processes: Processes) -> None:
    for changed in processes.run(1, changes_of_all):
        assert changed.keys() == set(map(name_of, functions()))
        assert not any(changed.values()), changed


def test_the_count_sees_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: Changed = {}
    monkeypatch.setattr(_Product, "forward", staticmethod(lambda left, right: torch.zeros(2, 2).add_(left @ right)))
    with counting([_Product], changed):
        product(torch.ones(2, 3), torch.ones(3, 2))
    assert changed == {"rcl_fast.autograd._Product": 1}
