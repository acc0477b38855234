"""How much a loss and its gradients launch: our kernels, and PyTorch's operations beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import leaves, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from rcl_fast.backends import triton as backend
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.kernels import (
    backward_narrow,
    backward_norm,
    backward_weights,
    backward_wide,
    block_sizes,
    forward,
    forward_combine,
    pack,
)

KERNELS = {
    "pack": (pack, "pack_kernel"),
    "forward": (forward, "forward_kernel"),
    "combine": (forward_combine, "combine_kernel"),
    "weights": (backward_weights, "weights_kernel"),
    "backward": (backward_narrow, "backward_kernel"),
    "dlogits": (backward_wide, "dlogits_kernel"),
    "project": (backward_norm, "project_kernel"),
}
# They launch nothing: memory without values, other views of it, and a question.
FREE = {"alias", "empty", "new_empty", "detach", "slice", "select", "view", "expand", "unsqueeze", "promote_types"}


class Launches(TorchDispatchMode):
    """Notes the names of our kernels and of PyTorch's operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launching = False  # the interpreter's operations are no part of what a GPU does

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not self.launching and name not in FREE:
            self.names.append(name)
        return function(*arguments, **named or {})

    def of(self, name: str, kernel: Any) -> Any:
        """Returns the kernel, its launches noted."""
        noting = self

        class Noted:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*arguments: Any, **options: Any) -> None:
                    noting.names.append(name)
                    noting.launching = True
                    kernel[grid](*arguments, **options)
                    noting.launching = False

                return launch

        return Noted()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    noting = Launches()
    for name, (module, kernel) in KERNELS.items():
        monkeypatch.setattr(module, kernel, noting.of(name, getattr(module, kernel)))
    monkeypatch.setattr(backend, "_is_traced", lambda: False)  # what it sees is our own mode
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return noting


def both_passes(launches: Launches, batch: ContrastiveBatch, reduction: str) -> tuple[list[str], list[str]]:
    """Returns what is launched in the forward pass, and in the backward pass."""
    ones = torch.ones(len(batch.labels) if reduction == "none" else (), device=batch.labels.device)
    with launches:
        loss = backend.losses(batch) if reduction == "none" else backend.total(batch, reduction)
        forward_names = launches.names.copy()
        launches.names.clear()
        torch.autograd.grad(loss, leaves(batch), ones)
    return forward_names, launches.names


@pytest.mark.parametrize(
    ("reduction", "beside_forward", "beside_backward"),
    [
        ("none", [], []),
        ("sum", ["sum"], []),
        ("mean", ["sum", "gt", "sum", "clamp", "div"], ["div"]),  # by how many anchors have a positive
    ],
)
def test_three_launches_forward_and_two_a_gradient_and_one(
    reduction: str, beside_forward: list[str], beside_backward: list[str], launches: Launches, device: torch.device
) -> None:
    forward_names, backward_names = both_passes(launches, random_batch(device, 30, 11, 32), reduction)
    assert forward_names == ["pack", "forward", "combine", *beside_forward]
    assert backward_names == [*beside_backward, "weights", *["backward", "project"] * 2]


def test_extra_keys_have_one_gradient_more(launches: Launches, device: torch.device) -> None:
    batch = random_batch(device, 30, 11, 32, extra_keys=20)
    forward_names, backward_names = both_passes(launches, batch, "none")
    assert forward_names == ["pack", "forward", "combine"]
    assert backward_names == ["weights", *["backward", "project"] * 3]
    launches.names.clear()
    assert both_passes(launches, batch._replace(keys=batch.keys.detach()), "none")[1] == [
        "weights",
        *["backward", "project"] * 2,
    ]


def test_a_frozen_input_launches_nothing(launches: Launches, device: torch.device) -> None:
    batch = random_batch(device, 30, 11, 32)
    batch = batch._replace(prototypes=batch.prototypes.detach())
    assert both_passes(launches, batch, "none")[1] == ["weights", "backward", "project"]


def test_wide_rows_have_one_product_more(
    launches: Launches, tiny_tiles: Callable[..., None], device: torch.device
) -> None:
    tiny_tiles(register_width=16)
    _, names = both_passes(launches, random_batch(device, 30, 11, 32), "none")
    assert names == ["weights", *["dlogits", "mm", "project"] * 2]


def test_float16_has_its_gradient_scale(launches: Launches, device: torch.device) -> None:
    _, names = both_passes(launches, random_batch(device, 30, 11, 32, dtype=torch.float16), "none")
    largest = ["abs", "amax", "amax", "mul"]  # of g, of the scales, and their product
    scale = ["gt", "scalar_tensor", "where", "reciprocal", "mul"]  # 2^13 over it, if it is not 0
    assert names == [*largest, *scale, "weights", *["backward", "project"] * 2]


def test_large_batches_have_one_histogram(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(block_sizes, "SCAN_LIMIT", 0)
    names, _ = both_passes(launches, random_batch(device, 30, 11, 32), "none")
    assert names == ["zeros", "ones_like", "index_add_", "pack", "forward", "combine"]


def test_part_of_the_anchors_launches_the_same(launches: Launches, device: torch.device) -> None:
    batch = random_batch(device, 30, 11, 32)
    with launches, torch.no_grad():
        _, lse, _, saved = backend.forward_rows(batch, 30)
        assert launches.names == ["pack", "forward", "combine"]
        launches.names.clear()
        backend.backward_rows(batch, 30, saved, lse, lse)
        assert launches.names == ["weights", *["backward", "project"] * 2]
        # Of fewer rows: the prototypes' gradient is of their losses alone.
        _, _, _, saved = backend.forward_rows(batch, 20)
        launches.names.clear()
        backend.backward_rows(batch, 20, saved, lse, lse)
    assert launches.names == ["weights", "weights", *["backward", "project"] * 2]
