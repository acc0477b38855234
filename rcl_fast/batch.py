"""What every backend gets: one flat, checked batch, and its rows as the equations have them.

The *keys* are what anchors are compared with: all N anchors, then the C prototypes where there are any; M in all. An
anchor is no key to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
    return ContrastiveBatch(  # not _replace, which PyTorch 2.7 does not compile
        features=batch.features,
        labels=ranks(batch.labels),
        prototypes=batch.prototypes,
        class_counts=batch.class_counts,
        compression=batch.compression,
        num_classes=len(batch.labels),
        temperature=batch.temperature,
        class_average=batch.class_average,
        normalize=batch.normalize,
    )


def accumulation_dtype(batch: ContrastiveBatch) -> torch.dtype:
    """Returns float64 where an input is float64, float32 otherwise (16-bit inputs included)."""
    dtypes = {batch.features.dtype} | ({batch.prototypes.dtype} if batch.prototypes is not None else set())
    return torch.float64 if torch.float64 in dtypes else torch.float32


def unit_rows(rows: Tensor) -> Tensor:
    """Returns h = z / ‖z‖ for each row of [R, D]; a zero row stays zero, with a finite gradient.

    Right for every row of finite numbers, also where the squares of ‖z‖ would leave the dtype's range.
    """
    scaled = rows / powers_of_two(rows)
    squares = (scaled * scaled).sum(dim=1, keepdim=True)
    return scaled / torch.where(squares > 0, squares, 1.0).sqrt()


def powers_of_two(rows: Tensor) -> Tensor:
    """Returns for each row of [R, D] the largest power of two in it [R, 1]: dividing by it rounds nothing.

    It is 1 for a zero row, a constant to autograd, and no number where a row has one that is not finite.
    """
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    mantissa = torch.frexp(largest).mantissa  # in [1/2, 1)
    return torch.where(largest == 0, 1.0, largest / (2 * mantissa))


def anchors_and_prototypes(
    batch: ContrastiveBatch, unit_rows: Callable[[Tensor], Tensor] = unit_rows
) -> tuple[Tensor, Tensor]:
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
