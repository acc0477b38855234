"""What `tiled` does with whole rows: unit rows, dot products, sums over classes. O(N·D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcl_fast.autograd import first_derivative_only
from rcl_fast.batch import powers_of_two


class _UnitRows(torch.autograd.Function):
    """Computes h = z / ‖z‖ by rows; the gradient reads and writes each row once: dz = (dh − h (h·dh)) / ‖z‖."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        powers = powers_of_two(rows)
        scaled = rows / powers
        norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        norms = norms.masked_fill(norms == 0, 1)
        unit = scaled / norms
        ctx.save_for_backward(unit, norms, powers)
        return unit

    @staticmethod
    @first_derivative_only("backend='tiled'")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor]:
        unit, norms, powers = ctx.saved_tensors
        along = row_products(unit, grad_output)
        return (torch.addcmul(grad_output, unit, along, value=-1).div_(norms).div_(powers),)


def unit_rows(rows: Tensor) -> Tensor:
    """Returns what `batch.unit_rows` does, and in less time: of its gradient nothing more is asked."""
    return _UnitRows.apply(rows)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns the dot product of each pair of rows, [R, D] and [R, D] -> [R, 1], without a temporary of [R, D]."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0]


def class_sums(rows: Tensor, classes: Tensor, count: int) -> Tensor:
    """Returns the sum of the rows [R, D] of each class, of classes [R] in [0, count): [count + 1, D]."""
    # One row more than there may be classes: of a single one Inductor would read the sum before it is made.
    return rows.new_zeros(count + 1, rows.shape[1]).index_add(0, classes, rows)


def sums_of_others(rows: Tensor, classes: Tensor) -> Tensor:
    """Returns for each row of [N, D] the sum of the other rows of its class, for rows of any length."""
    return _SumsOfOthers.apply(rows, classes)


class _SumsOfOthers(torch.autograd.Function):
    """Adds the rows of each class before and behind each row: a difference would be what rounding leaves of a long row.

    The sums are those of a symmetric matrix of 0 and 1 with the rows, and so are their gradients.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, classes: Tensor) -> Tensor:
        ctx.save_for_backward(classes)
        order = classes.argsort(stable=True)
        rows, classes = rows[order], classes[order]
        others = _sums_before(rows, classes) + _sums_before(rows.flip(0), classes.flip(0)).flip(0)
        return torch.zeros_like(rows).index_copy(0, order, others)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (classes,) = ctx.saved_tensors
        return _SumsOfOthers.apply(grad_output, classes), None


def _sums_before(rows: Tensor, classes: Tensor) -> Tensor:
    """Returns for each row of [N, D], sorted by class, the sum of the rows of its class before it; by doubling."""
    positions = torch.arange(len(rows), device=rows.device)

    def earlier(sums: Tensor, distance: int) -> Tensor:
        there = (positions - distance).clamp(min=0)
        is_one = (positions >= distance) & (classes[there] == classes)
        return torch.where(is_one[:, None], sums[there], 0.0)

    # Compiled code makes steps for a million rows: how many there are would be one more graph.
    steps = 20 if torch.compiler.is_compiling() else max(0, len(rows) - 1).bit_length()
    sums = earlier(rows, 1)
    for step in range(steps):
        sums = sums + earlier(sums, 2**step)
    return sums
