"""Runs the forward and the backward pass of the loss, each a few launches, without a host synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.backward_narrow import gradient_parts
from rcl_fast.kernels.backward_norm import project
from rcl_fast.kernels.backward_weights import gradient_weights
from rcl_fast.kernels.backward_wide import gradient_chunks
from rcl_fast.kernels.forward import partial_sums
from rcl_fast.kernels.forward_combine import combine
from rcl_fast.kernels.pack import KernelInputs, Packed, Part, Sections, pack
from rcl_fast.kernels.tiles import SCALE

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class BackwardOptions(NamedTuple):
    """What the backward pass must know of the loss, beside tensors."""

    width: int  # D of the raw rows
    anchors: int
    extra_keys: int
    prototypes: int
    anchors_are_keys: bool
    class_average: bool
    normalize: bool
    bounded: bool  # `block_sizes.is_bounded`

    @classmethod
    def of(cls, inputs: KernelInputs) -> BackwardOptions:
        flags = inputs.anchors_are_keys, inputs.class_average, inputs.normalize, inputs.bounded
        return cls(inputs.features.shape[1], *inputs.sections(), *flags)

    @property
    def sections(self) -> Sections:
        return Sections(self.anchors, self.extra_keys, self.prototypes)

    @property
    def has_term(self) -> bool:
        """Whether the keys of an anchor's class weigh more than others know, as the anchor is left out of them."""
        return self.class_average and self.anchors_are_keys


def forward(inputs: KernelInputs, rows: int | None = None) -> Outputs:
    """Returns ℓ_i [rows] and what `backward` reads: lse_i [rows] in base 2, and the packed keys, vectors and labels.

    rows: of the first so many anchors, with the keys of all; None: of all N. lse_i is +inf for an anchor without a
    positive.
    """
    sections, options = inputs.sections(), BackwardOptions.of(inputs)
    rows = sections.anchors if rows is None else rows
    if rows == 0:
        return _of_no_anchors(inputs)
    with torch.cuda.device_of(inputs.features):  # Triton launches on the current device, which need not be the tensors'
        packed = pack(inputs)
        partials = partial_sums(packed, _part_of_anchors(options, rows), options.has_term, inputs.bounded)
        loss, lse = combine(partials, packed.vectors)
    return loss, lse, *packed


def _of_no_anchors(inputs: KernelInputs) -> Outputs:
    """Returns what `forward` does where no loss is asked for, and launches nothing."""
    features, P = inputs.features, inputs.sections().starts[-1]
    none, vectors = (torch.zeros(*shape, dtype=torch.float32, device=features.device) for shape in ((0,), (6, P)))
    keys = features.new_zeros(P, block_sizes.packed_width(features.shape[1]))
    return none, none.clone(), keys, vectors, torch.zeros(P, dtype=torch.int32, device=features.device)


def backward(
    packed: Packed,
    lse: Tensor,
    grad_output: Tensor,
    options: BackwardOptions,
    wanted: tuple[bool, bool, bool],
    rows: int | None = None,
) -> Gradients:
    """Returns the gradients of raw features [rows, D], extra keys [Q, D] and prototypes [C, D]; None: not wanted.

    packed: as `forward` made it. lse and grad_output are [N], the latter with any stride. rows: of the first so many
    features, and of the others by these anchors' losses; None: all.
    """
    rows = options.anchors if rows is None else rows
    _, extra_start, prototype_start, _ = options.sections.starts
    parts = (
        _part_of_anchors(options, rows),
        Part(extra_start, options.extra_keys, 0, rows),
        Part(prototype_start, options.prototypes, 0, rows),
    )
    with torch.cuda.device_of(packed.keys):
        grad_scale = _grad_scale(packed, grad_output)

        def weights_of(anchors: int) -> Tensor:
            return gradient_weights(packed, lse, grad_output, grad_scale, anchors, options.bounded)

        # An anchor's gradient has its part in everyone's loss, a key's those of the first rows.
        of_all = weights_of(options.anchors) if wanted[0] or rows == options.anchors else None
        of_rows = of_all if rows == options.anchors or not any(wanted[1:]) else weights_of(rows)
        features, extra_keys, prototypes = (
            _gradient(packed, weights, part, grad_scale, options) if weights is not None and is_wanted else None
            for weights, part, is_wanted in zip((of_all, of_rows, of_rows), parts, wanted, strict=True)
        )
    return features, extra_keys, prototypes


def _part_of_anchors(options: BackwardOptions, rows: int) -> Part:
    """Returns the first so many anchors, and all their keys."""
    _, extra_start, _, end = options.sections.starts
    key_start = 0 if options.anchors_are_keys else extra_start
    return Part(0, rows, key_start, end - key_start)


def _gradient(
    packed: Packed, weights: Tensor, part: Part, grad_scale: Tensor | None, options: BackwardOptions
) -> Tensor:
    """Returns the gradient of a part's raw rows [rows, D]."""
    keys, normalize = packed.keys, options.normalize
    out = keys.new_empty(part.rows, options.width)
    if part.keys == 0 or part.rows == 0:
        return out.zero_()
    made_of = packed, weights, part, options.has_term, options.bounded
    if block_sizes.in_registers(*block_sizes.product_of(keys), keys.shape[1]):
        project(out, gradient_parts(*made_of), packed, grad_scale, part.row_start, normalize)
        return out
    for start, chunk in gradient_chunks(*made_of):
        project(out[start : start + len(chunk)], chunk[None], packed, grad_scale, part.row_start + start, normalize)
    return out


def _grad_scale(packed: Packed, grad_output: Tensor) -> Tensor | None:
    """Returns what grad_output is to be multiplied by [1], for float16 keys; None for others.

    dL/dlogits is float16 too where the keys are: the scale puts its largest below 2^14, and keeps the small ones.
    """
    if packed.keys.dtype != torch.float16 or not len(grad_output):
        return None
    largest = grad_output.abs().amax() * packed.vectors[SCALE.value].amax()
    return (2.0**13 / torch.where(largest > 0, largest, 1.0)).reshape(1)
