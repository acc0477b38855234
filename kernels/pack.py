"""Does all that costs O((N + C)·D) in one launch: packs the keys, makes row scales and log-weights, counts classes."""

# mypy: allow-untyped-defs
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.tiles import load_rows


class KernelInputs(NamedTuple):
    """A loss's anchors, prototypes and options, as `pack_kernel` reads them."""

    features: Tensor  # [N, D] contiguous
    prototypes: Tensor | None  # [C, D] contiguous, in the features' dtype
    labels: Tensor  # [N] contiguous, in [0, num_classes)
    class_counts: Tensor | None  # [C]
    compression: Tensor | None  # [C]
    root: float | Tensor  # √(log2(e)/T); in traced code float32 [] on the device, so that T is no constant of a graph
    num_classes: int
    class_average: bool
    normalize: bool
    bounded: bool  # `block_sizes.is_bounded`


class Packed(NamedTuple):
    """The keys as the other kernels read them: the anchors, then the prototypes."""

    keys: Tensor  # [M, K] raw rows, each over a power of two
    vectors: Tensor  # float32 [4, M]: scale, bias, count of the key's class, 1 / the power of two
    labels: Tensor  # int32 [M]


@triton.jit
def load_raw(p_features, p_prototypes, o_k, o_d, N, M, D: tl.constexpr, PROTOTYPES: tl.constexpr):
    """Loads rows as they were given, [., DEPTH]: features, then prototypes; zeros behind D."""
    b_z = load_rows(p_features, o_k, o_k < N, o_d, D)
    if PROTOTYPES:
        b_c = load_rows(p_prototypes, o_k - N, (o_k >= N) & (o_k < M), o_d, D)
        b_z = tl.where((o_k < N)[:, None], b_z, b_c)
    return b_z


@triton.jit(do_not_specialize=["N", "M"])
def pack_kernel(
    p_features,  # [N, D]
    p_prototypes,  # [C, D]
    p_labels,  # [N]
    p_class_counts,  # [C]
    p_compression,  # [C]
    p_histogram,  # [C] anchors of each class; not read with SCAN
    p_keys,  # [M, K] out: features, then prototypes, each over a power of two; K = D rounded up, zeros behind D
    p_vectors,  # [4, M] out: scale τ/‖z‖·√(log2(e)/T), bias b in base 2, count of the key's class, 1 / power of two
    p_key_labels,  # [M] out, int32
    N,
    M,
    root,  # √(log2(e)/T), or [] with LOAD_ROOT: on both sides of a product, for the same bits from either side
    D: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AVERAGE: tl.constexpr,
    REBALANCE: tl.constexpr,
    COMPRESS: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    SCAN: tl.constexpr,
    EXPONENTS: tl.constexpr,  # the largest of a power of two, and minus the smallest
    HEADROOM: tl.constexpr,  # exponent of a packed row's largest number
    LOAD_ROOT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    LABELS: tl.constexpr,
):
    i_rows = tl.program_id(0)
    o_k = i_rows * ROWS + tl.arange(0, ROWS)
    m_k = o_k < M
    m_anchor = o_k < N
    b_y = tl.load(p_labels + o_k, mask=m_anchor, other=0).to(tl.int32)  # [ROWS]
    if PROTOTYPES:
        b_y = tl.where(m_anchor, b_y, o_k - N)

    b_largest = tl.zeros([ROWS], dtype=tl.float32)
    for o in range(0, K, DEPTH):
        b_z = load_raw(p_features, p_prototypes, o_k, o + tl.arange(0, DEPTH), N, M, D, PROTOTYPES)  # [ROWS, DEPTH]
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_z.to(tl.float32)), 1))
    # 2^e from the bits of its exponent, so that nothing is rounded; it and its inverse are normal numbers.
    b_exponent = (b_largest.to(tl.int32, bitcast=True) >> 23) - 127
    b_exponent = tl.minimum(tl.maximum(b_exponent, -EXPONENTS), EXPONENTS) - HEADROOM
    b_exponent = tl.where(b_largest == 0, 0, b_exponent)
    b_inverse = ((127 - b_exponent) << 23).to(tl.float32, bitcast=True)

    b_squares = tl.zeros([ROWS], dtype=tl.float32)
    for o in range(0, K, DEPTH):
        o_d = o + tl.arange(0, DEPTH)
        b_z = load_raw(p_features, p_prototypes, o_k, o_d, N, M, D, PROTOTYPES).to(tl.float32) * b_inverse[:, None]
        offsets = o_k.to(tl.int64)[:, None] * K + o_d[None, :]
        tl.store(p_keys + offsets, b_z, mask=m_k[:, None] & (o_d < K)[None, :])
        b_squares += tl.sum(b_z * b_z, 1)

    if LOAD_ROOT:
        root = tl.load(root)
    b_scale = tl.zeros([ROWS], dtype=tl.float32) + root
    if NORMALIZE:
        b_scale /= tl.sqrt_rn(tl.where(b_squares > 0, b_squares, 1.0))
    else:
        b_scale /= b_inverse
    if COMPRESS:
        b_scale *= tl.load(p_compression + b_y, mask=m_k, other=1).to(tl.float32)

    if SCAN:  # counting N labels for each row beats a histogram's launches while N is small
        b_same = tl.zeros([ROWS], dtype=tl.int32)
        for o in range(0, N, LABELS):
            o_i = o + tl.arange(0, LABELS)
            b_other = tl.load(p_labels + o_i, mask=o_i < N, other=-1).to(tl.int32)
            b_same += tl.sum((b_y[:, None] == b_other[None, :]).to(tl.int32), 1)
    else:
        b_same = tl.load(p_histogram + b_y, mask=m_k, other=1)
    b_count = b_same.to(tl.float32)
    if PROTOTYPES:
        b_count += 1

    b_bias = tl.zeros([ROWS], dtype=tl.float32)
    if REBALANCE:
        b_n = tl.load(p_class_counts + b_y, mask=m_k, other=1).to(tl.float64)  # a count may exceed float32
        b_bias += tl.log2(b_n).to(tl.float32)
    if AVERAGE:
        b_bias -= tl.log2(tl.maximum(b_count, 1))

    tl.store(p_vectors + o_k, b_scale, mask=m_k)
    tl.store(p_vectors + M + o_k, b_bias, mask=m_k)
    tl.store(p_vectors + 2 * M + o_k, b_count, mask=m_k)
    tl.store(p_vectors + 3 * M + o_k, b_inverse, mask=m_k)
    tl.store(p_key_labels + o_k, b_y, mask=m_k)


def pack(inputs: KernelInputs) -> Packed:
    """Launches the kernel; returns the keys as the other kernels read them."""
    features, prototypes = inputs.features, inputs.prototypes
    N, D = features.shape
    M = N + (0 if prototypes is None else prototypes.shape[0])
    K = block_sizes.packed_width(D)
    device = features.device
    keys = torch.empty(M, K, dtype=features.dtype, device=device)
    vectors = torch.empty(4, M, dtype=torch.float32, device=device)
    key_labels = torch.empty(M, dtype=torch.int32, device=device)
    scan = N <= block_sizes.SCAN_LIMIT
    pack_kernel[(triton.cdiv(M, 16),)](
        features,
        prototypes,
        inputs.labels,
        inputs.class_counts,
        inputs.compression,
        None if scan else _histogram(inputs.labels, inputs.num_classes),
        keys,
        vectors,
        key_labels,
        N,
        M,
        inputs.root,
        D=D,
        K=K,
        NORMALIZE=inputs.normalize,
        AVERAGE=inputs.class_average,
        REBALANCE=inputs.class_counts is not None,
        COMPRESS=inputs.compression is not None,
        PROTOTYPES=prototypes is not None,
        SCAN=scan,
        EXPONENTS=block_sizes.exponents(features.dtype, inputs.normalize),
        LOAD_ROOT=isinstance(inputs.root, Tensor),
        HEADROOM=block_sizes.headroom(features.dtype, inputs.normalize),
        ROWS=16,
        DEPTH=min(128, triton.next_power_of_2(K)),
        LABELS=min(128, triton.next_power_of_2(N)),
        num_warps=4,
    )
    return Packed(keys, vectors, key_labels)


def _histogram(labels: Tensor, num_classes: int) -> Tensor:
    """Counts the anchors of each class, int32 [C]; integers add up to the same in any order."""
    zeros = torch.zeros(num_classes, dtype=torch.int32, device=labels.device)
    return zeros.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int32))
