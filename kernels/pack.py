"""Does all that costs O((N + C)·D) in one launch: packs the keys, makes row scales and log-weights, counts classes."""

# mypy: allow-untyped-defs
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes


class KernelInputs(NamedTuple):
    """A loss's anchors, prototypes and options, as `pack_kernel` reads them."""

    features: Tensor  # [N, D] contiguous
    prototypes: Tensor | None  # [C, D] contiguous, in the features' dtype
    labels: Tensor  # [N] contiguous, in [0, num_classes)
    class_counts: Tensor | None  # [C]
    compression: Tensor | None  # [C]
    num_classes: int
    temperature: float
    class_average: bool
    normalize: bool


class Packed(NamedTuple):
    """The keys as the other kernels read them: the anchors, then the prototypes."""

    keys: Tensor  # [M, K] raw rows; the features themselves where they need no packing
    vectors: Tensor  # float32 [3, M]: scale, bias, count of the key's class
    labels: Tensor  # int32 [M]


@triton.jit(do_not_specialize=["N", "M"])
def pack_kernel(
    p_features,  # [N, D]
    p_prototypes,  # [C, D]
    p_labels,  # [N]
    p_class_counts,  # [C]
    p_compression,  # [C]
    p_histogram,  # [C] anchors of each class; not read with SCAN
    p_keys,  # [M, K] out with PACK: features, then prototypes, K = D rounded up, zeros behind D
    p_vectors,  # [3, M] out: scale τ/‖z‖·√(log2(e)/T), bias b in base 2, count of the key's class
    p_key_labels,  # [M] out, int32
    N,
    M,
    root,  # √(log2(e)/T): on both sides of a product, so that it has the same bits from either side
    D: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AVERAGE: tl.constexpr,
    REBALANCE: tl.constexpr,
    COMPRESS: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    SCAN: tl.constexpr,
    PACK: tl.constexpr,
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

    b_squares = tl.zeros([ROWS], dtype=tl.float32)
    if NORMALIZE or PACK:
        for o in range(0, K, DEPTH):
            o_d = o + tl.arange(0, DEPTH)
            m_d = (o_d < D)[None, :]
            offsets = o_k.to(tl.int64)[:, None] * D + o_d[None, :]
            b_z = tl.load(p_features + offsets, mask=m_anchor[:, None] & m_d, other=0.0)  # [ROWS, DEPTH]
            if PROTOTYPES:
                offsets = (o_k - N).to(tl.int64)[:, None] * D + o_d[None, :]
                b_c = tl.load(p_prototypes + offsets, mask=(m_k & (o_k >= N))[:, None] & m_d, other=0.0)
                b_z = tl.where(m_anchor[:, None], b_z, b_c)
            if PACK:
                offsets = o_k.to(tl.int64)[:, None] * K + o_d[None, :]
                tl.store(p_keys + offsets, b_z, mask=m_k[:, None] & (o_d < K)[None, :])
            b_squares += tl.sum(b_z.to(tl.float32) * b_z.to(tl.float32), 1)

    b_scale = tl.zeros([ROWS], dtype=tl.float32) + root
    if NORMALIZE:
        b_scale /= tl.sqrt_rn(tl.where(b_squares > 0, b_squares, 1.0))
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
        b_bias += tl.log2(tl.load(p_class_counts + b_y, mask=m_k, other=1).to(tl.float32))
    if AVERAGE:
        b_bias -= tl.log2(tl.maximum(b_count, 1))

    tl.store(p_vectors + o_k, b_scale, mask=m_k)
    tl.store(p_vectors + M + o_k, b_bias, mask=m_k)
    tl.store(p_vectors + 2 * M + o_k, b_count, mask=m_k)
    tl.store(p_key_labels + o_k, b_y, mask=m_k)


def pack(inputs: KernelInputs) -> Packed:
    """Launches the kernel; returns the keys as the other kernels read them."""
    features, prototypes = inputs.features, inputs.prototypes
    N, D = features.shape
    M = N + (0 if prototypes is None else prototypes.shape[0])
    K = block_sizes.packed_width(D)
    device = features.device
    must_pack = block_sizes.must_pack(features, prototypes)
    keys = torch.empty(M, K, dtype=features.dtype, device=device) if must_pack else features
    vectors = torch.empty(3, M, dtype=torch.float32, device=device)
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
        math.sqrt(math.log2(math.e) / inputs.temperature),
        D=D,
        K=K,
        NORMALIZE=inputs.normalize,
        AVERAGE=inputs.class_average,
        REBALANCE=inputs.class_counts is not None,
        COMPRESS=inputs.compression is not None,
        PROTOTYPES=prototypes is not None,
        SCAN=scan,
        PACK=must_pack,
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
