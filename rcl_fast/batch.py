"""What every backend gets: one flat, checked batch, and its rows as the equations have them.

The *keys* are what anchors are compared with, M in all: the N anchors, unless they are left out, then Q more keys and
the C prototypes, where there are any. An anchor is no key to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Compression factors, and what a tensor on a GPU does not say of them without a synchronisation."""

    values: Tensor  # [C]
    at_most_one: bool  # whether no factor is known to be above 1


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
    keys: Tensor | None = None  # [Q, D] more keys, raw, never anchors
    key_labels: Tensor | None = None  # [Q] int64, as labels
    anchors_are_keys: bool = True
    factors_at_most_one: bool = False  # whether compression is known to hold no factor above 1


def replaced(batch: ContrastiveBatch, **changes: Any) -> ContrastiveBatch:
    """Returns the batch with other values in some fields, like `_replace`, which PyTorch 2.7 does not compile."""
    fields = ContrastiveBatch._fields  # not the batch's, which it does not compile either
    values: list[Any] = [changes.get(name, value) for name, value in zip(fields, batch, strict=True)]
    return ContrastiveBatch(*values)


def with_class_indices(batch: ContrastiveBatch) -> ContrastiveBatch:
    """Returns the batch with labels in [0, N + Q) where nothing says how many classes there are; otherwise as it is."""
    if batch.num_classes:
        return batch
    if batch.key_labels is None:
        return replaced(batch, labels=ranks(batch.labels), num_classes=len(batch.labels))
    N, together = len(batch.labels), ranks(torch.cat([batch.labels, batch.key_labels]))
    return replaced(batch, labels=together[:N], key_labels=together[N:], num_classes=len(together))


def labels_of_keys(batch: ContrastiveBatch) -> Tensor:
    """Returns the labels of all keys but the prototypes: [N + Q], or [Q] where the anchors are no keys."""
    anchors = batch.labels if batch.anchors_are_keys else batch.labels[:0]
    return anchors if batch.key_labels is None else torch.cat([anchors, batch.key_labels])


def raw_rows(batch: ContrastiveBatch) -> list[Tensor]:
    """Returns features [N, D], keys [Q, D] and prototypes [C, D], without those that are not there."""
    return [rows for rows in (batch.features, batch.keys, batch.prototypes) if rows is not None]


def input_dtype(batch: ContrastiveBatch) -> torch.dtype:
    """Returns the dtype that PyTorch promotes features, keys and prototypes to."""
    dtype = batch.features.dtype
    for rows in raw_rows(batch):
        dtype = torch.promote_types(dtype, rows.dtype)
    return dtype


def accumulation_dtype(batch: ContrastiveBatch) -> torch.dtype:
    """Returns float64 where an input is float64, float32 otherwise (16-bit inputs included)."""
    return torch.promote_types(input_dtype(batch), torch.float32)


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


def compressed_rows(
    batch: ContrastiveBatch, unit_rows: Callable[[Tensor], Tensor] = unit_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns h̃ of anchors [N, D], keys [Q, D] and prototypes [C, D], [0, D] where there are none.

    Unit rows, then compressed.
    """
    dtype = accumulation_dtype(batch)
    factors = None if batch.compression is None else batch.compression.to(dtype)[:, None]  # [C, 1]

    def compressed(rows: Tensor | None, classes: Tensor | slice | None) -> Tensor:
        if rows is None:
            return batch.features.new_empty(0, batch.features.shape[1], dtype=dtype)
        rows = unit_rows(rows.to(dtype)) if batch.normalize else rows.to(dtype)
        return rows if factors is None else rows * factors[classes]

    return (
        compressed(batch.features, batch.labels),
        compressed(batch.keys, batch.key_labels),
        compressed(batch.prototypes, slice(None)),
    )


def ranks(labels: Tensor) -> Tensor:
    """Returns any integers [N] as numbers in [0, N), like `unique`'s inverse but without its host synchronisation."""
    ordered, order = labels.long().sort()
    is_next = torch.zeros_like(ordered)
    is_next[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(ordered).scatter_(0, order, is_next.cumsum(0))
