"""The kernels on part of the anchors, all of them being keys: what each of several processes computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from batches import PRESETS, assert_as_exact_as_plain, random_batch
from torch import Tensor

from rcl_fast.backends import triton as backend
from rcl_fast.batch import ContrastiveBatch


def losses_by_parts(batch: ContrastiveBatch, sizes: list[int]) -> Tensor:
    """ℓ_i as processes with so many anchors each compute them, and their gradients."""
    return _Parts.apply(batch.features, batch.keys, batch.prototypes, batch, sizes)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        keys: Tensor | None,
        prototypes: Tensor | None,
        batch: ContrastiveBatch,
        sizes: list[int],
    ) -> Tensor:
        ctx.orders = [_part_first(len(features), sizes, part) for part in range(len(sizes))]
        ctx.batches = [batch._replace(features=features[order], labels=batch.labels[order]) for order in ctx.orders]
        ctx.sizes = sizes
        losses, lse, _, ctx.saved = zip(*map(backend.forward_rows, ctx.batches, sizes), strict=True)
        ctx.lse = torch.cat(lse)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            backend.backward_rows(batch, size, saved, ctx.lse[order], grad_output[order])
            for batch, size, saved, order in zip(ctx.batches, ctx.sizes, ctx.saved, ctx.orders, strict=True)
        ]
        for_features, for_prototypes, for_keys = zip(*gradients, strict=True)
        return torch.cat(for_features), _added(for_keys), _added(for_prototypes), None, None


def _added(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(list(parts)).float().sum(0)


def _part_first(n: int, sizes: list[int], part: int) -> Tensor:
    parts = list(torch.arange(n).split(sizes))
    return torch.cat([parts.pop(part), *parts])


@pytest.mark.parametrize(
    ("preset", "register_width", "sizes"),
    [
        *((preset, *each) for preset, each in product(PRESETS, [(64, [33, 17]), (16, [1, 0, 49])])),
        ("bcl_rcl", 64, [50]),  # the rest of a whole is test_kernel_values.py's
        ("bcl_rcl", 16, [33, 17]),
    ],
    ids=str,
)
def test_parts_make_the_whole(
    preset: str, register_width: int, sizes: list[int], tiny_tiles: Callable[..., None], device: torch.device
) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, N=50, C=37, D=40, **PRESETS[preset])
    assert_as_exact_as_plain(batch, loss=partial(losses_by_parts, sizes=sizes))


@pytest.mark.parametrize(("sizes", "anchors_are_keys"), [([33, 17], True), ([1, 0, 49], False)], ids=str)
def test_extra_keys_of_every_part(sizes: list[int], anchors_are_keys: bool, device: torch.device) -> None:
    batch = random_batch(device, N=50, C=37, D=40, extra_keys=41, anchors_are_keys=anchors_are_keys)
    assert_as_exact_as_plain(batch, loss=partial(losses_by_parts, sizes=sizes))


@pytest.mark.parametrize("temperature", [0.1, 0.02], ids=["bounded", "online"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype, temperature: float, device: torch.device) -> None:
    batch = random_batch(device, N=50, C=9, D=40, dtype=dtype, compressed=True, temperature=temperature)
    # Two parts of the prototypes' gradient are each rounded to the dtype before they are added up.
    assert_as_exact_as_plain(batch, loss=partial(losses_by_parts, sizes=[29, 21]), factor=3)
