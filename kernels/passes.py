"""Runs the forward and the backward pass of the loss, each a few launches, without a host synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.backward_narrow import gradient_parts
from rcl_fast.kernels.backward_norm import project
from rcl_fast.kernels.backward_wide import gradient_chunks
from rcl_fast.kernels.forward import partial_sums
from rcl_fast.kernels.forward_combine import combine
from rcl_fast.kernels.pack import KernelInputs, Packed, pack

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class BackwardOptions(NamedTuple):
    """What the backward pass must know of the loss, beside tensors."""

    width: int  # D of the raw rows
    class_average: bool
    normalize: bool
    bounded: bool  # `block_sizes.is_bounded`


def forward(inputs: KernelInputs, rows: int | None = None) -> Outputs:
    """Returns ℓ_i [rows] and what `backward` reads: lse_i [rows] in base 2, and the packed keys, vectors and labels.

    rows: of the first so many anchors, though all are keys; None: of all N. lse_i is +inf for an anchor without a
    positive.
    """
    features, prototypes = inputs.features, inputs.prototypes
    rows = len(features) if rows is None else rows
    if rows == 0:
        return _of_no_anchors(features, prototypes)
    with torch.cuda.device_of(features):  # Triton launches on the current device, which need not be the tensors'
        packed = pack(inputs)
        partials = partial_sums(packed, rows, inputs.class_average, inputs.bounded)
        loss, lse = combine(partials, packed.vectors, inputs.class_average)
    return loss, lse, *packed


def _of_no_anchors(features: Tensor, prototypes: Tensor | None) -> Outputs:
    """Returns what `forward` does where no loss is asked for, and launches nothing."""
    M = len(features) + (0 if prototypes is None else len(prototypes))
    none, vectors = (torch.zeros(*shape, dtype=torch.float32, device=features.device) for shape in ((0,), (4, M)))
    keys = features.new_zeros(M, block_sizes.packed_width(features.shape[1]))
    return none, none.clone(), keys, vectors, torch.zeros(M, dtype=torch.int32, device=features.device)


def backward(
    packed: Packed,
    lse: Tensor,
    grad_output: Tensor,
    options: BackwardOptions,
    wanted: tuple[bool, bool],
    rows: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of the raw features [rows, D] and prototypes [C, D], None for one that is not wanted.

    packed: as `forward` made it. lse and grad_output are [N], the latter with any stride. rows: of the first so many
    features, and of the prototypes by these anchors' losses; None: all.
    """
    keys = packed.keys
    N, M = len(lse), len(keys)
    rows = N if rows is None else rows

    def gradient(row_start: int, row_end: int, key_end: int) -> Tensor:
        out = keys.new_empty(row_end - row_start, options.width)
        if key_end == 0 or row_start == row_end:
            return out.zero_()
        part = packed, lse, scaled, row_start, len(out), key_end, options.class_average, options.bounded
        if block_sizes.in_registers(*block_sizes.product_of(keys), keys.shape[1]):
            project(out, gradient_parts(*part), packed, grad_scale, row_start, options.normalize)
            return out
        for start, chunk in gradient_chunks(*part):
            project(
                out[start : start + len(chunk)], chunk[None], packed, grad_scale, row_start + start, options.normalize
            )
        return out

    with torch.cuda.device_of(keys):
        grad_scale, scaled = _scaled(packed, grad_output)
        return (
            gradient(0, rows, M) if wanted[0] else None,
            gradient(N, M, rows) if wanted[1] else None,
        )


def _scaled(packed: Packed, grad_output: Tensor) -> tuple[Tensor | None, Tensor]:
    """Returns (gradient scale [1], grad_output times it) for float16 keys, (None, grad_output) for others.

    dL/dlogits is float16 too where the keys are: the scale puts its largest below 2^14, and keeps the small ones.
    """
    if packed.keys.dtype != torch.float16 or not len(grad_output):
        return None, grad_output
    largest = grad_output.abs().amax() * packed.vectors[0].amax()
    grad_scale = (2.0**13 / torch.where(largest > 0, largest, 1.0)).reshape(1)
    return grad_scale, grad_output * grad_scale
