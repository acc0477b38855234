"""What every backend gets: one flat, checked batch, and the quantities of the equations that cost O(N + C)."""

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
    """Labels in [0, N) where nothing says how many classes there are; the batch as it is otherwise."""
    if batch.num_classes:
        return batch
    return batch._replace(labels=ranks(batch.labels), num_classes=len(batch.labels))


def accumulation_dtype(batch: ContrastiveBatch) -> torch.dtype:
    """float64 where an input is float64, float32 otherwise (16-bit inputs included)."""
    dtypes = {batch.features.dtype} | ({batch.prototypes.dtype} if batch.prototypes is not None else set())
    return torch.float64 if torch.float64 in dtypes else torch.float32


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward(ctx, upstream): users call it inside autocast too, which would round its products to 16 bits."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, upstream: Tensor) -> Any:
        with torch.autocast(upstream.device.type, enabled=False):
            return backward(ctx, upstream)

    return wrapped


class _UnitRows(torch.autograd.Function):
    """h = z / ‖z‖ by rows, whose gradient reads and writes each row once: dz = (dh − h (h·dh)) / ‖z‖."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        norms = norms.masked_fill(norms == 0, 1)
        unit = rows / norms
        ctx.save_for_backward(unit, norms)
        return unit

    @staticmethod
    @without_autocast
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        unit, norms = ctx.saved_tensors
        return torch.addcmul(upstream, unit, row_products(unit, upstream), value=-1) / norms


def unit_rows(rows: Tensor) -> Tensor:
    """h = z / ‖z‖ for each row of [R, D]; a zero row stays zero, with a finite gradient."""
    return _UnitRows.apply(rows)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each pair of rows, [R, D] and [R, D] -> [R, 1], without a temporary of [R, D]."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0]


def anchors_and_prototypes(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """h̃ of the anchors [N, D] and of the prototypes [C, D] ([0, D] without any): unit length, then compressed."""
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


def keys_per_class(batch: ContrastiveBatch) -> Tensor:
    """count[j], int64 [C]: the batch histogram, and one more for each prototype. No host synchronisation."""
    start = torch.full(
        (batch.num_classes,), int(batch.prototypes is not None), dtype=torch.int64, device=batch.labels.device
    )
    return start.index_add(0, batch.labels, torch.ones_like(batch.labels))


def positives_per_anchor(batch: ContrastiveBatch) -> Tensor:
    """|P(i)|, int64 [N]: the keys of the anchor's class without the anchor itself."""
    return keys_per_class(batch)[batch.labels] - 1


def class_log_weights(batch: ContrastiveBatch) -> Tensor:
    """b of a key of class j as an anchor of another class meets it [C]: log n_j (eq. 4-6) − log count[j] (eq. 3, 5)."""
    dtype = accumulation_dtype(batch)
    log_weights = torch.zeros(batch.num_classes, dtype=dtype, device=batch.labels.device)
    if batch.class_counts is not None:
        log_weights = log_weights + batch.class_counts.to(dtype).log()
    if batch.class_average:
        # A class without a key has no b; 1 keeps its logarithm finite.
        log_weights = log_weights - keys_per_class(batch).clamp(min=1).to(dtype).log()
    return log_weights


def own_class_log_weights(batch: ContrastiveBatch) -> Tensor:
    """What b gains on keys of the anchor's own class [N]: log count − log(count − 1), the anchor being left out."""
    count = keys_per_class(batch)[batch.labels].to(accumulation_dtype(batch))
    return torch.where(count > 1, count.log() - (count - 1).clamp(min=1).log(), 0.0)


def ranks(labels: Tensor) -> Tensor:
    """Any integers as class indices in [0, N), like `unique`'s inverse but without its host synchronisation."""
    ordered, order = labels.long().sort()
    is_next = torch.zeros_like(ordered)
    is_next[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(ordered).scatter_(0, order, is_next.cumsum(0))
