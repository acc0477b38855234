"""What every backend gets: one flat, checked batch, and its rows as the equations have them.

The *keys* are what anchors are compared with: all N anchors, then the C prototypes where there are any; M in all. An
anchor is no key to itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ContrastiveBatch(NamedTuple):
    """Anchors, keys and options of one loss (paper, eq. 3-6), already checked by `rcl_fast.functional`."""

    features: Tensor  # [N, D] the anchors, raw
    labels: Tensor  # [N] int64 in [0, num_classes); any integers where num_classes is 0 (`with_class_indices`)
    prototypes: Tensor | None  # [C, D] one more key per class, raw
    class_counts: Tensor | None  # [C] n_j; None where nothing is rebalanced
    compression: Tensor | None  # [C] tau_j
    num_classes: int  # 0: nothing says how many there are
    temperature: float
    class_average: bool
    normalize: bool


def with_class_indices(batch: ContrastiveBatch) -> ContrastiveBatch:
    """Returns the batch with labels in [0, N) where nothing says how many classes there are, and as it is otherwise."""
    if batch.num_classes:
        return batch
    return batch._replace(labels=ranks(batch.labels), num_classes=len(batch.labels))


def accumulation_dtype(batch: ContrastiveBatch) -> torch.dtype:
    """Returns float64 where an input is float64, float32 otherwise (16-bit inputs included)."""
    dtypes = {batch.features.dtype} | ({batch.prototypes.dtype} if batch.prototypes is not None else set())
    return torch.float64 if torch.float64 in dtypes else torch.float32


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a backward(ctx, grad_output): called inside autocast, it would round its products to 16 bits."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, grad_output: Tensor) -> Any:
        with torch.autocast(grad_output.device.type, enabled=False):
            return backward(ctx, grad_output)

    return wrapped


class _UnitRows(torch.autograd.Function):
    """Computes h = z / ‖z‖ by rows; the gradient reads and writes each row once: dz = (dh − h (h·dh)) / ‖z‖."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        norms = norms.masked_fill(norms == 0, 1)
        unit = rows / norms
        ctx.save_for_backward(unit, norms)
        return unit

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        unit, norms = ctx.saved_tensors
        return torch.addcmul(grad_output, unit, row_products(unit, grad_output), value=-1) / norms


def unit_rows(rows: Tensor) -> Tensor:
    """Returns h = z / ‖z‖ for each row of [R, D]; a zero row stays zero, with a finite gradient."""
    return _UnitRows.apply(rows)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns the dot product of each pair of rows, [R, D] and [R, D] -> [R, 1], without a temporary of [R, D]."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0]


def anchors_and_prototypes(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Returns h̃ of the anchors [N, D] and the prototypes [C, D] ([0, D] without any): unit rows, then compressed."""
    dtype = accumulation_dtype(batch)
    anchors = batch.features.to(dtype)
    prototypes = anchors.new_empty(0, anchors.shape[1]) if batch.prototypes is None else batch.prototypes.to(dtype)
    if batch.normalize:
        anchors, prototypes = unit_rows(anchors), unit_rows(prototypes)
    if batch.compression is not None:
        factors = batch.compression.to(dtype)[:, None]  # [C, 1]
        anchors = anchors * factors[batch.labels]
        prototypes = prototypes * factors[: len(prototypes)]
    return anchors, prototypes


def ranks(labels: Tensor) -> Tensor:
    """Returns any integers [N] as numbers in [0, N), like `unique`'s inverse but without its host synchronisation."""
    ordered, order = labels.long().sort()
    is_next = torch.zeros_like(ordered)
    is_next[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(ordered).scatter_(0, order, is_next.cumsum(0))
