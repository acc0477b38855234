"""Does all that costs O((N + Q + C)·D) in one launch: packs the keys, makes scales and weights, counts classes."""

# mypy: allow-untyped-defs
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.tiles import INVERSE, LOG_COUNT, POSITIVES, SCALE, TERM, WEIGHT, load_rows


class KernelInputs(NamedTuple):
    """A loss's rows, labels and options, as `pack_kernel` reads them. All tensors are contiguous."""

    features: Tensor  # [N, D] the anchors
    extra_keys: Tensor | None  # [Q, D] keys that are no anchors, in the features' dtype
    prototypes: Tensor | None  # [C, D] likewise
    labels: Tensor  # [N] in [0, num_classes)
    extra_labels: Tensor | None  # [Q] likewise
    class_counts: Tensor | None  # [C]
    compression: Tensor | None  # [C]
    root: float | Tensor  # √(log2(e)/T); in traced code float32 [] on the device, so that T is no constant of a graph
    num_classes: int
    anchors_are_keys: bool
    class_average: bool
    normalize: bool
    bounded: bool  # `block_sizes.is_bounded`

    def sections(self) -> "Sections":
        extra, prototypes = self.extra_keys, self.prototypes
        return Sections(
            anchors=self.features.shape[0],
            extra_keys=0 if extra is None else extra.shape[0],
            prototypes=0 if prototypes is None else prototypes.shape[0],
        )


class Sections(NamedTuple):
    """How many rows of each kind are packed: in this order, each kind from a multiple of `ALIGNMENT` on."""

    anchors: int
    extra_keys: int
    prototypes: int

    @property
    def starts(self) -> tuple[int, int, int, int]:
        """The first row of each kind, and the end of all."""
        extra_keys = block_sizes.aligned(self.anchors)
        prototypes = extra_keys + block_sizes.aligned(self.extra_keys)
        return 0, extra_keys, prototypes, prototypes + block_sizes.aligned(self.prototypes)


class Packed(NamedTuple):
    """The keys as the other kernels read them; P rows, of which those that fill up a section are zeros."""

    keys: Tensor  # [P, K] raw rows, each over a power of two
    vectors: Tensor  # float32 [6, P], see tiles.py
    labels: Tensor  # int32 [P], −1 where there is no key


class Part(NamedTuple):
    """Rows of the packed keys, and the keys that they are compared with."""

    row_start: int
    rows: int
    key_start: int
    keys: int


class Origins(NamedTuple):
    """Where the packed rows of a block come from: an offset into each source, and whether it is the row's."""

    o_anchor: tl.tensor
    o_extra: tl.tensor
    o_prototype: tl.tensor
    is_anchor: tl.tensor
    is_extra: tl.tensor
    is_prototype: tl.tensor


@triton.jit
def load_raw(sources, origins, o_d, D: tl.constexpr, EXTRA: tl.constexpr, PROTOTYPES: tl.constexpr):
    """Loads rows as they were given, [., DEPTH], of (features, extra keys, prototypes); zeros behind D."""
    b_z = load_rows(sources[0], origins.o_anchor, origins.is_anchor, o_d, D)
    if EXTRA:
        b_q = load_rows(sources[1], origins.o_extra, origins.is_extra, o_d, D)
        b_z = tl.where(origins.is_extra[:, None], b_q, b_z)
    if PROTOTYPES:
        b_c = load_rows(sources[2], origins.o_prototype, origins.is_prototype, o_d, D)
        b_z = tl.where(origins.is_prototype[:, None], b_c, b_z)
    return b_z


@triton.jit
def count_labels(b_y, p_labels, N, LABELS: tl.constexpr):
    """Returns for each label of b_y how many of the N labels equal it, int32."""
    b_same = tl.zeros_like(b_y)
    for o in range(0, N, LABELS):
        o_i = o + tl.arange(0, LABELS)
        b_other = tl.load(p_labels + o_i, mask=o_i < N, other=-1).to(tl.int32)
        b_same += tl.sum((b_y[:, None] == b_other[None, :]).to(tl.int32), 1)
    return b_same


@triton.jit(do_not_specialize=["N", "Q", "C"])
def pack_kernel(
    p_features,  # [N, D]
    p_extra,  # [Q, D]
    p_prototypes,  # [C, D]
    p_labels,  # [N]
    p_extra_labels,  # [Q]
    p_class_counts,  # [C]
    p_compression,  # [C]
    p_histogram,  # [C] keys of each class but prototypes; not read with SCAN
    p_keys,  # [P, K] out: every row over a power of two; K = D rounded up, zeros behind D
    p_vectors,  # [6, P] out, see tiles.py
    p_key_labels,  # [P] out, int32
    N,
    Q,
    C,
    extra_start,
    prototype_start,
    P,
    root,  # √(log2(e)/T), or [] with LOAD_ROOT: on both sides of a product, for the same bits from either side
    D: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AVERAGE: tl.constexpr,
    REBALANCE: tl.constexpr,
    COMPRESS: tl.constexpr,
    BOUNDED: tl.constexpr,
    ANCHORS_ARE_KEYS: tl.constexpr,
    EXTRA: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    SCAN: tl.constexpr,
    EXPONENTS: tl.constexpr,  # the largest of a power of two, and minus the smallest
    HEADROOM: tl.constexpr,  # exponent of a packed row's largest number
    LOAD_ROOT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    LABELS: tl.constexpr,
):
    o_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_q, o_c = o_k - extra_start, o_k - prototype_start
    origins = Origins(o_k, o_q, o_c, o_k < N, (o_q >= 0) & (o_q < Q), (o_c >= 0) & (o_c < C))
    m_k = origins.is_anchor | origins.is_extra | origins.is_prototype  # the others fill up a section
    b_y = tl.load(p_labels + o_k, mask=origins.is_anchor, other=-1).to(tl.int32)  # [ROWS]
    if EXTRA:
        b_y = tl.where(
            origins.is_extra, tl.load(p_extra_labels + o_q, mask=origins.is_extra, other=-1).to(tl.int32), b_y
        )
    if PROTOTYPES:
        b_y = tl.where(origins.is_prototype, o_c, b_y)

    sources = (p_features, p_extra, p_prototypes)
    b_largest = tl.zeros([ROWS], dtype=tl.float32)
    for o in range(0, K, DEPTH):
        b_z = load_raw(sources, origins, o + tl.arange(0, DEPTH), D, EXTRA, PROTOTYPES)  # [ROWS, DEPTH]
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_z.to(tl.float32)), 1))
    # 2^e from the bits of its exponent, so that nothing is rounded; it and its inverse are normal numbers.
    b_exponent = (b_largest.to(tl.int32, bitcast=True) >> 23) - 127
    b_exponent = tl.minimum(tl.maximum(b_exponent, -EXPONENTS), EXPONENTS) - HEADROOM
    b_exponent = tl.where(b_largest == 0, 0, b_exponent)
    b_inverse = ((127 - b_exponent) << 23).to(tl.float32, bitcast=True)

    b_squares = tl.zeros([ROWS], dtype=tl.float32)
    for o in range(0, K, DEPTH):
        o_d = o + tl.arange(0, DEPTH)
        b_z = load_raw(sources, origins, o_d, D, EXTRA, PROTOTYPES).to(tl.float32) * b_inverse[:, None]
        offsets = o_k.to(tl.int64)[:, None] * K + o_d[None, :]
        tl.store(p_keys + offsets, b_z, mask=(o_d < K)[None, :])
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

    b_same = tl.zeros([ROWS], dtype=tl.int32)
    if SCAN:  # counting all labels for each row beats a histogram's launches while they are few
        if ANCHORS_ARE_KEYS:
            b_same += count_labels(b_y, p_labels, N, LABELS)
        if EXTRA:
            b_same += count_labels(b_y, p_extra_labels, Q, LABELS)
    else:
        b_same += tl.load(p_histogram + b_y, mask=m_k, other=0)
    if PROTOTYPES:
        b_same += 1
    b_count = tl.maximum(b_same, 1).to(tl.float32)  # of a class without a key nothing is asked
    b_positives, b_term = b_same.to(tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    if ANCHORS_ARE_KEYS:  # an anchor is not counted by itself
        b_positives = b_count - 1
        b_term = tl.log2(b_count / tl.maximum(b_positives, 1))

    b_log_count = tl.zeros([ROWS], dtype=tl.float32)
    if REBALANCE:
        b_n = tl.load(p_class_counts + b_y, mask=m_k, other=1).to(tl.float64)  # a count may exceed float32
        b_log_count += tl.log2(b_n).to(tl.float32)
    b_weight = b_log_count
    if AVERAGE:
        b_weight = b_log_count - tl.log2(b_count)
    b_weight = tl.where(m_k, b_weight, -float("inf"))
    if BOUNDED:
        b_weight = tl.exp2(b_weight)

    tl.store(p_vectors + SCALE * P + o_k, tl.where(m_k, b_scale, 0.0))
    tl.store(p_vectors + WEIGHT * P + o_k, b_weight)
    tl.store(p_vectors + TERM * P + o_k, b_term)
    tl.store(p_vectors + POSITIVES * P + o_k, b_positives)
    tl.store(p_vectors + LOG_COUNT * P + o_k, b_log_count)
    tl.store(p_vectors + INVERSE * P + o_k, b_inverse)
    tl.store(p_key_labels + o_k, b_y)


PACK_ROWS = 16  # of a program; `ALIGNMENT` is a multiple


def pack(inputs: KernelInputs) -> Packed:
    """Launches the kernel; returns the keys as the other kernels read them."""
    features, sections = inputs.features, inputs.sections()
    _, extra_start, prototype_start, P = sections.starts
    if P > block_sizes.MOST_ROWS:
        raise ValueError(
            f"the kernels take {block_sizes.MOST_ROWS:,} rows at most, of features, keys and prototypes together; got "
            f"{P:,}; pass fewer keys"
        )
    K, device = block_sizes.packed_width(features.shape[1]), features.device
    keys = torch.empty(P, K, dtype=features.dtype, device=device)
    vectors = torch.empty(6, P, dtype=torch.float32, device=device)
    key_labels = torch.empty(P, dtype=torch.int32, device=device)
    scan = sections.anchors + sections.extra_keys <= block_sizes.SCAN_LIMIT
    pack_kernel[(P // PACK_ROWS,)](
        features,
        inputs.extra_keys,
        inputs.prototypes,
        inputs.labels,
        inputs.extra_labels,
        inputs.class_counts,
        inputs.compression,
        None if scan else _histogram(inputs),
        keys,
        vectors,
        key_labels,
        *sections,
        extra_start,
        prototype_start,
        P,
        inputs.root,
        D=features.shape[1],
        K=K,
        NORMALIZE=inputs.normalize,
        AVERAGE=inputs.class_average,
        REBALANCE=inputs.class_counts is not None,
        COMPRESS=inputs.compression is not None,
        BOUNDED=inputs.bounded,
        ANCHORS_ARE_KEYS=inputs.anchors_are_keys,
        EXTRA=inputs.extra_keys is not None,
        PROTOTYPES=inputs.prototypes is not None,
        SCAN=scan,
        EXPONENTS=block_sizes.exponents(features.dtype, inputs.normalize),
        LOAD_ROOT=isinstance(inputs.root, Tensor),
        HEADROOM=block_sizes.headroom(features.dtype, inputs.normalize),
        ROWS=PACK_ROWS,
        DEPTH=min(128, triton.next_power_of_2(K)),
        LABELS=min(128, triton.next_power_of_2(max(sections.anchors, sections.extra_keys, 1))),
        num_warps=4,
    )
    return Packed(keys, vectors, key_labels)


def _histogram(inputs: KernelInputs) -> Tensor:
    """Counts the keys of each class but prototypes, int32 [C]; integers add up to the same in any order."""
    counts = torch.zeros(inputs.num_classes, dtype=torch.int32, device=inputs.labels.device)
    for labels in (inputs.labels if inputs.anchors_are_keys else None, inputs.extra_labels):
        if labels is not None:
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int32))
    return counts
