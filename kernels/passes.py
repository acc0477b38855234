"""Forward and backward pass of the loss, each a few launches. No host synchronisation anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.backward_narrow import gradient_parts
from rcl_fast.kernels.backward_norm import project
from rcl_fast.kernels.backward_wide import gradient_chunks
from rcl_fast.kernels.forward import partial_sums
from rcl_fast.kernels.forward_combine import combine
from rcl_fast.kernels.pack import Packed, pack

Result = TypeVar("Result")


def _on_the_device_of_the_first(function: Callable[..., Result]) -> Callable[..., Result]:
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(function)
    def guarded(first: Tensor, *rest: object, **named: object) -> Result:
        with torch.cuda.device_of(first):
            return function(first, *rest, **named)

    return guarded


@_on_the_device_of_the_first
def forward(
    features: Tensor,
    prototypes: Tensor | None,
    labels: Tensor,
    class_counts: Tensor | None,
    compression: Tensor | None,
    num_classes: int,
    temperature: float,
    class_average: bool,
    normalize: bool,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ℓ_i [rows] and what `backward` reads: lse_i [rows] in base 2, keys [M, K], vectors [3, M], key labels [M].

    features [N, D] and prototypes [C, D] contiguous and of one dtype; labels [N]. The keys are empty where they would
    be the features themselves. rows: of the first so many anchors, though all are keys; None: of all N.
    """
    rows = len(features) if rows is None else rows
    if rows == 0:
        return _of_no_anchors(features, prototypes)
    packed = pack(
        features, prototypes, labels, class_counts, compression, num_classes, temperature, class_average, normalize
    )
    bounded = block_sizes.is_bounded(temperature, normalize, compression is not None)
    partials = partial_sums(packed, rows, class_average, bounded)
    loss, lse = combine(partials, packed.vectors, class_average)
    keys = (
        packed.keys
        if block_sizes.must_pack(features, prototypes)
        else features.new_empty(0, block_sizes.packed_width(features.shape[1]))
    )
    return loss, lse, keys, packed.vectors, packed.labels


def _of_no_anchors(features: Tensor, prototypes: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns where no loss is asked for: nothing is launched."""
    M = len(features) + (0 if prototypes is None else len(prototypes))
    none, vectors = (torch.zeros(*shape, dtype=torch.float32, device=features.device) for shape in ((0,), (3, M)))
    keys = features.new_zeros(
        M if block_sizes.must_pack(features, prototypes) else 0, block_sizes.packed_width(features.shape[1])
    )
    return none, none.clone(), keys, vectors, torch.zeros(M, dtype=torch.int32, device=features.device)


@_on_the_device_of_the_first
def backward(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    upstream: Tensor,
    D: int,
    class_average: bool,
    normalize: bool,
    bounded: bool,
    for_features: bool,
    for_prototypes: bool,
    rows: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the raw features [rows, D] and prototypes [C, D], each only where it is wanted.

    keys [M, K] as packed by `forward`, or the features; lse and upstream [N], the latter with any stride; bounded as
    `block_sizes.is_bounded` says. rows: of the first so many features, and of the prototypes by these anchors' losses;
    None: all.
    """
    N, M = len(lse), len(keys)
    rows = N if rows is None else rows
    packed = Packed(keys, vectors, key_labels)
    gain, upstream = _scaled(packed, upstream)

    def gradient(row_start: int, row_end: int, key_end: int) -> Tensor:
        out = keys.new_empty(row_end - row_start, D)
        if key_end == 0 or row_start == row_end:
            return out.zero_()
        of = packed, lse, upstream, row_start, len(out), key_end, class_average, bounded
        if block_sizes.in_registers(*block_sizes.product_of(keys), keys.shape[1]):
            project(out, gradient_parts(*of), packed, gain, row_start, normalize)
            return out
        for start, chunk in gradient_chunks(*of):
            project(out[start : start + len(chunk)], chunk[None], packed, gain, row_start + start, normalize)
        return out

    return (
        gradient(0, rows, M) if for_features else None,
        gradient(N, M, rows) if for_prototypes else None,
    )


def _scaled(packed: Packed, upstream: Tensor) -> tuple[Tensor | None, Tensor]:
    """(gain, upstream times it). Weights of float16 keys are float16 too: with this gain the largest can be 2^14."""
    if packed.keys.dtype != torch.float16 or not len(upstream):
        return None, upstream
    largest = upstream.abs().amax() * packed.vectors[0].amax()
    gain = (2.0**13 / torch.where(largest > 0, largest, 1.0)).reshape(1)
    return gain, upstream * gain
