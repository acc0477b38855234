"""What the kernels share: the packed keys, tiles of their rows, and products of these."""

# mypy: allow-untyped-defs
from typing import NamedTuple

import triton
import triton.language as tl

# Rows of the vectors [6, P] that `pack.py` writes.
SCALE = tl.constexpr(0)  # τ/‖z‖·√(log2(e)/T)
WEIGHT = tl.constexpr(1)  # 2^b where the loss is bounded, b where it is not; of no key 0, or −∞
TERM = tl.constexpr(2)  # γ, what b has more on keys of the anchor's class
POSITIVES = tl.constexpr(3)  # |P| of an anchor of the class
LOG_COUNT = tl.constexpr(4)  # log2 n
INVERSE = tl.constexpr(5)  # 1 / the power of two that a packed row is divided by


class Keys(NamedTuple):
    """The packed keys: pointers, and how many rows there are."""

    p_rows: tl.tensor  # [P, K]
    p_labels: tl.tensor  # [P], −1 where there is no key
    p_vectors: tl.tensor  # [6, P]
    p_weights: tl.tensor  # [5, P] or [2, P]; the forward pass has none, and reads none
    P: tl.tensor


@triton.jit
def load_tile(p_rows, row, feature, ROWS: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr):
    """Loads [ROWS, DEPTH] at (row, feature) of a contiguous [., K] matrix, zeros behind K; 64 bits: P·K passes 2^31."""
    o_d = feature + tl.arange(0, DEPTH)
    pointers = p_rows + tl.cast(row, tl.int64) * K + (tl.arange(0, ROWS)[:, None] * K + o_d[None, :])
    if K % DEPTH == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(o_d < K)[None, :], other=0.0)


@triton.jit
def load_rows(p_rows, o_rows, m_rows, o_d, K: tl.constexpr):
    """Loads any rows of a contiguous [., K] matrix."""
    offsets = o_rows.to(tl.int64)[:, None] * K + o_d[None, :]
    return tl.load(p_rows + offsets, mask=m_rows[:, None] & (o_d < K)[None, :], other=0.0)


@triton.jit
def products(
    p_rows, row, key, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns z_a · z_k of the tile at (row, key), float32 [ROWS, KEYS], summed in steps of DEPTH features."""
    b_s = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    for o in range(0, K, DEPTH):
        b_a = load_tile(p_rows, row, o, ROWS, DEPTH, K)
        b_k = load_tile(p_rows, key, o, KEYS, DEPTH, K)
        b_s = tl.dot(b_a, tl.trans(b_k), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def diagonal_tiles(row, key_start, first, last, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Returns which tiles of keys, [begin, end) within [first, last), may hold one of the rows [row, row + ROWS)."""
    begin = tl.maximum(row - key_start, 0) // KEYS
    end = (tl.maximum(row + ROWS - key_start, 0) + KEYS - 1) // KEYS
    return tl.minimum(tl.maximum(begin, first), last), tl.minimum(tl.maximum(end, first), last)


@triton.jit
def online_logits(b_s, b_scales, same, b_term_a, b_bias, AVERAGE: tl.constexpr):
    """Returns t + b of raw products [ROWS, KEYS]; b_term_a is [ROWS], b_bias of rows [ROWS, 1] or of keys [1, KEYS].

    Both passes round here, and `tl.fma` leaves the compiler no choice where: the probability of a dominant key is then
    1 and no bit more.
    """
    if AVERAGE:
        return tl.fma(b_s, b_scales, tl.where(same, b_term_a[:, None], 0.0)) + b_bias
    else:
        return tl.fma(b_s, b_scales, tl.broadcast_to(b_bias, b_s.shape))
