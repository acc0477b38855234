"""Forward and backward pass of the loss as launches of the kernels. No host synchronisation anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
import triton
from torch import Tensor

from rcl_fast.kernels import configs
from rcl_fast.kernels.backward import backward_kernel
from rcl_fast.kernels.combine import combine_kernel
from rcl_fast.kernels.forward import forward_kernel
from rcl_fast.kernels.prepare import prepare_kernel
from rcl_fast.kernels.project import project_kernel
from rcl_fast.kernels.weights import weights_kernel

# Octaves of similarity up to which 2^s needs no pivot: with log2 n and log2 M on top it stays far inside float32.
BOUNDED_OCTAVES = 32.0

# Products of 16-bit matrices into float32: cuBLAS, from PyTorch 2.8 on.
_MIXED_PRODUCTS = torch.__version__ >= "2.8" and torch.version.cuda is not None


Result = TypeVar("Result")


def _on_the_device_of_the_first(function: Callable[..., Result]) -> Callable[..., Result]:
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(function)
    def guarded(first: Tensor, *rest: object, **named: object) -> Result:
        with torch.cuda.device_of(first):
            return function(first, *rest, **named)

    return guarded


def packed_width(D: int) -> int:
    """Columns of a packed key: D rounded up, so that every row starts at an aligned address."""
    return -(-D // 16) * 16


def must_pack(features: Tensor, prototypes: Tensor | None) -> bool:
    """Whether the keys need a matrix of their own; otherwise they are the features as they are."""
    return prototypes is not None or features.shape[1] != packed_width(features.shape[1])


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
    N, D = features.shape
    rows = N if rows is None else rows
    M = N + (0 if prototypes is None else prototypes.shape[0])
    K = packed_width(D)
    device = features.device
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    vectors = torch.empty(3, M, dtype=torch.float32, device=device)
    key_labels = torch.empty(M, dtype=torch.int32, device=device)
    pack = must_pack(features, prototypes)
    keys = torch.empty((M, K) if pack else (0, K), dtype=features.dtype, device=device)
    if rows == 0:
        return loss, lse, keys.zero_(), vectors.zero_(), key_labels.zero_()

    scan = N <= configs.SCAN_LIMIT
    depth = min(128, triton.next_power_of_2(K))
    prepare_kernel[(triton.cdiv(M, 16),)](
        features,
        prototypes,
        labels,
        class_counts,
        compression,
        None if scan else _histogram(labels, num_classes),
        keys,
        vectors,
        key_labels,
        N,
        M,
        math.sqrt(math.log2(math.e) / temperature),
        D=D,
        K=K,
        NORMALIZE=normalize,
        AVERAGE=class_average,
        REBALANCE=class_counts is not None,
        COMPRESS=compression is not None,
        PROTOTYPES=prototypes is not None,
        SCAN=scan,
        PACK=pack,
        ROWS=16,
        DEPTH=depth,
        LABELS=min(128, triton.next_power_of_2(N)),
        num_warps=4,
    )

    arch = configs.architecture(device)
    kind = configs.kind_of(features.dtype, arch)
    config = configs.choose("forward", arch, kind, K, rows, M)
    splits, tiles_per_split = _split(arch, triton.cdiv(rows, config.rows), triton.cdiv(M, config.keys))
    partials = torch.empty(splits, 3, rows, dtype=torch.float32, device=device)
    forward_kernel[(triton.cdiv(rows, config.rows), splits)](
        keys if pack else features,
        vectors,
        key_labels,
        partials,
        rows,
        M,
        tiles_per_split,
        K=K,
        AVERAGE=class_average,
        BOUNDED=is_bounded(temperature, normalize, compression is not None),
        ROWS=config.rows,
        KEYS=config.keys,
        DEPTH=config.depth,
        PRECISION=_precision(kind),
        **config.options,
    )
    combine_kernel[(triton.cdiv(rows, 128),)](
        partials, vectors, loss, lse, rows, M, splits, AVERAGE=class_average, ROWS=128, num_warps=4
    )
    return loss, lse, keys, vectors, key_labels


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
    `is_bounded` says. rows: of the first so many features, and of the prototypes by these anchors' losses; None: all.
    """
    N, M = len(lse), len(keys)
    rows = N if rows is None else rows
    # Weights of float16 keys are float16 too: with this gain the largest that can occur is 2^14.
    gain = None
    if keys.dtype == torch.float16 and N:
        largest = upstream.abs().amax() * vectors[0].amax()
        gain = (2.0**13 / torch.where(largest > 0, largest, 1.0)).reshape(1)
        upstream = upstream * gain
    arch = configs.architecture(keys.device)
    kind = configs.kind_of(keys.dtype, arch)

    def gradient(row_start: int, row_end: int, key_end: int) -> Tensor:
        out = torch.empty(row_end - row_start, D, dtype=keys.dtype, device=keys.device)
        if key_end == 0 or row_start == row_end:
            return out.zero_()
        (_in_registers if configs.in_registers(arch, kind, keys.shape[1]) else _through_workspace)(
            arch, kind, out, keys, vectors, key_labels, lse, upstream, gain, row_start, key_end,
            class_average, normalize, bounded,
        )  # fmt: skip
        return out

    return (
        gradient(0, rows, M) if for_features else None,
        gradient(N, M, rows) if for_prototypes else None,
    )


def _in_registers(
    arch: int, kind: str, out: Tensor, keys: Tensor, vectors: Tensor, key_labels: Tensor, lse: Tensor,
    upstream: Tensor, gain: Tensor | None, row_start: int, key_end: int,
    average: bool, normalize: bool, bounded: bool,
) -> None:  # fmt: skip
    rows, (M, K) = len(out), keys.shape
    config = configs.choose("backward", arch, kind, K, rows, key_end)
    row_blocks = triton.cdiv(rows, config.rows)
    splits, tiles_per_split = _split(arch, row_blocks, triton.cdiv(key_end, config.keys))
    parts = torch.empty(splits, rows, K, dtype=torch.float32, device=out.device)
    backward_kernel[(row_blocks, splits)](
        keys,
        vectors,
        key_labels,
        lse,
        upstream,
        parts,
        len(lse),
        M,
        row_start,
        row_start + rows,
        key_end,
        tiles_per_split,
        upstream.stride(0),
        K=K,
        AVERAGE=average,
        BOUNDED=bounded,
        ROWS=config.rows,
        KEYS=config.keys,
        DEPTH=config.depth,
        PRECISION=_precision(kind),
        **config.options,
    )
    _project(out, parts, keys, vectors, gain, row_start, normalize)


def _through_workspace(
    arch: int, kind: str, out: Tensor, keys: Tensor, vectors: Tensor, key_labels: Tensor, lse: Tensor,
    upstream: Tensor, gain: Tensor | None, row_start: int, key_end: int,
    average: bool, normalize: bool, bounded: bool,
) -> None:  # fmt: skip
    rows, (M, K) = len(out), keys.shape
    key_stride = triton.cdiv(key_end, 16) * 16
    fitting = configs.WORKSPACE_BYTES // (key_stride * keys.element_size())
    chunk = min(rows, max(128, fitting // 128 * 128))
    workspace = torch.empty(chunk, key_stride, dtype=keys.dtype, device=keys.device)
    for start in range(0, rows, chunk):
        end = min(start + chunk, rows)
        config = configs.choose("weights", arch, kind, K, end - start, key_end)
        weights_kernel[(triton.cdiv(end - start, config.rows), triton.cdiv(key_end, config.keys))](
            keys,
            vectors,
            key_labels,
            lse,
            upstream,
            workspace,
            len(lse),
            M,
            row_start + start,
            row_start + end,
            key_end,
            key_stride,
            upstream.stride(0),
            K=K,
            AVERAGE=average,
            BOUNDED=bounded,
            ROWS=config.rows,
            KEYS=config.keys,
            DEPTH=config.depth,
            PRECISION=_precision(kind),
            **config.options,
        )
        parts = _float32_product(workspace[: end - start, :key_end], keys[:key_end])
        _project(out[start:end], parts[None], keys, vectors, gain, row_start + start, normalize)


def _project(
    out: Tensor, parts: Tensor, keys: Tensor, vectors: Tensor, gain: Tensor | None,
    row_start: int, normalize: bool,
) -> None:  # fmt: skip
    (rows, D), K = out.shape, keys.shape[1]
    depth = triton.next_power_of_2(K)
    block = max(1, 2048 // depth)
    project_kernel[(triton.cdiv(rows, block),)](
        parts,
        keys,
        vectors,
        gain,
        out,
        row_start,
        rows,
        len(parts),
        D=D,
        K=K,
        NORMALIZE=normalize,
        SCALED=gain is not None,
        ROWS=block,
        DEPTH=depth,
        num_warps=4,
    )


def _histogram(labels: Tensor, num_classes: int) -> Tensor:
    """Anchors of each class, int32 [C]; integers add up to the same in any order."""
    zeros = torch.zeros(num_classes, dtype=torch.int32, device=labels.device)
    return zeros.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int32))


def _split(arch: int, row_blocks: int, tiles: int) -> tuple[int, int]:
    """(splits, key tiles of each) that fill the device; no split is empty."""
    wanted = max(1, configs.PROGRAMS[arch] // row_blocks)
    tiles_per_split = max(1, triton.cdiv(tiles, wanted))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def is_bounded(temperature: float, normalize: bool, compressed: bool) -> bool:
    """|s| ≤ 1/T is certain for unit rows; compression factors are values on the device, and may exceed 1."""
    return normalize and not compressed and math.log2(math.e) / temperature <= BOUNDED_OCTAVES


def _precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32; the caller's autocast must not round it to 16 bits."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != torch.float32 and _MIXED_PRODUCTS and left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
