"""Log-sum-exp and positives' sum of a block of anchors over a range of keys; the N×M similarities stay in registers."""

# mypy: allow-untyped-defs
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.pack import Packed, Part
from rcl_fast.kernels.tiles import SCALE, TERM, WEIGHT, Keys, diagonal_tiles, load_tile, online_logits, products


class Side(NamedTuple):
    """What a tile's logits need of its anchors, or of its keys: vectors."""

    index: tl.tensor
    label: tl.tensor
    scale: tl.tensor
    term: tl.tensor  # read of the anchors only
    weight: tl.tensor  # 2^b or b, read of the keys only


class Sums(NamedTuple):
    """Sums over the keys so far, one number an anchor; base 2."""

    maximum: tl.tensor  # 0 where the loss is bounded
    exponentials: tl.tensor  # of 2^(t + b − maximum)
    positives: tl.tensor  # of t, without γ


@triton.jit
def load_side(keys, o):
    """Loads what logits need of anchors or keys; the compiler leaves out what nothing reads."""
    return Side(
        o,
        tl.load(keys.p_labels + o),
        tl.load(keys.p_vectors + SCALE * keys.P + o),
        tl.load(keys.p_vectors + TERM * keys.P + o),
        tl.load(keys.p_vectors + WEIGHT * keys.P + o),
    )


@triton.jit
def raw_products(
    p_keys, b_a, row, key, KEYS: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Returns z_a · z_k of the tile at (row, key), float32 [ROWS, KEYS], of b_a [ROWS, DEPTH] if it has whole rows."""
    if K <= DEPTH:
        return tl.dot(b_a, tl.trans(load_tile(p_keys, key, 0, KEYS, DEPTH, K)), input_precision=PRECISION)
    else:
        return products(p_keys, row, key, b_a.shape[0], KEYS, DEPTH, K, PRECISION)


@triton.jit
def add_tile(sums, b_s, a, k, AVERAGE: tl.constexpr, BOUNDED: tl.constexpr, ITSELF: tl.constexpr):
    """Returns the sums with a tile of raw products [ROWS, KEYS] added. ITSELF: it may hold an anchor with itself."""
    b_scales = a.scale[:, None] * k.scale[None, :]
    same = a.label[:, None] == k.label[None, :]
    itself = a.index[:, None] == k.index[None, :]
    b_t = b_s * b_scales
    if ITSELF:
        b_t = tl.where(itself, 0.0, b_t)
    if BOUNDED:
        is_same = tl.where(same, 1.0, 0.0)  # nothing is infinite, so a product does for a choice, in one instruction
        b_positives = sums.positives + tl.sum(is_same * b_t, 1)
        if AVERAGE:
            b_t += is_same * a.term[:, None]
        b_exp = tl.exp2(b_t)
        if ITSELF:
            b_exp = tl.where(itself, 0.0, b_exp)
        return Sums(sums.maximum, sums.exponentials + tl.sum(b_exp * k.weight[None, :], 1), b_positives)
    else:
        b_positives = sums.positives + tl.sum(tl.where(same, b_t, 0.0), 1)
        b_logits = online_logits(b_s, b_scales, same, a.term, k.weight[None, :], AVERAGE)
        if ITSELF:
            b_logits = tl.where(itself, -float("inf"), b_logits)
        b_max = tl.maximum(sums.maximum, tl.max(b_logits, 1))
        b_sum = sums.exponentials * tl.exp2(sums.maximum - b_max) + tl.sum(tl.exp2(b_logits - b_max[:, None]), 1)
        return Sums(b_max, b_sum, b_positives)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_split"])
def forward_kernel(
    p_keys,  # [P, K] packed rows, the anchors first
    p_key_labels,  # [P]
    p_vectors,  # [6, P], see tiles.py
    p_partials,  # [SPLITS, 3, rows] out: `Sums`
    P,
    rows,  # of anchors
    key_start,  # the first of the keys: 0, or the first row that is no anchor
    tiles,  # of keys
    tiles_per_split,
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    BOUNDED: tl.constexpr,  # |s| is known to be small: no running maximum is needed
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_split = tl.program_id(1)
    row = tl.program_id(0) * ROWS
    o_a, o_k = row + tl.arange(0, ROWS), key_start + tl.arange(0, KEYS)
    keys = Keys(p_keys, p_key_labels, p_vectors, p_vectors, P)
    a = load_side(keys, o_a)
    b_a = load_tile(p_keys, row, 0, ROWS, DEPTH, K)  # [ROWS, DEPTH], once for all keys, if that is whole rows

    # The running maximum starts at -1e38, not -inf, so that a tile without a key gives 0 and not NaN.
    b_zeros = tl.zeros([ROWS], dtype=tl.float32)
    sums = Sums(tl.full([ROWS], 0.0 if BOUNDED else -1e38, dtype=tl.float32), b_zeros, b_zeros)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    begin, end = diagonal_tiles(row, key_start, first, last, ROWS, KEYS)
    for i in range(first, last - (end - begin)):
        offset = tl.where(i < begin, i, i + end - begin) * KEYS
        b_s = raw_products(p_keys, b_a, row, key_start + offset, KEYS, DEPTH, K, PRECISION)
        sums = add_tile(sums, b_s, a, load_side(keys, o_k + offset), AVERAGE, BOUNDED, False)
    for i in range(begin, end):
        b_s = raw_products(p_keys, b_a, row, key_start + i * KEYS, KEYS, DEPTH, K, PRECISION)
        sums = add_tile(sums, b_s, a, load_side(keys, o_k + i * KEYS), AVERAGE, BOUNDED, True)

    m_a = o_a < rows
    p_out = p_partials + i_split.to(tl.int64) * 3 * rows + o_a
    tl.store(p_out, sums.maximum, mask=m_a)
    tl.store(p_out + rows, sums.exponentials, mask=m_a)
    tl.store(p_out + 2 * rows, sums.positives, mask=m_a)


def partial_sums(packed: Packed, part: Part, class_average: bool, bounded: bool) -> Tensor:
    """Launches the kernel for the anchors of a part; returns float32 [splits, 3, rows], a split for some keys."""
    keys, vectors, labels = packed
    P, K = keys.shape
    device, math_mode = block_sizes.product_of(keys)
    launches = block_sizes.launches("forward", device, math_mode, K, part.rows, part.keys)
    partials = torch.empty(
        sum(one.grid.splits for one in launches), 3, part.rows, dtype=torch.float32, device=keys.device
    )
    done = 0
    for sizes, grid, first_key in launches:
        forward_kernel[(grid.row_blocks, grid.splits)](
            keys,
            labels,
            vectors,
            partials[done:],
            P,
            part.rows,
            part.key_start + first_key,
            grid.tiles,
            grid.tiles_per_split,
            K=K,
            AVERAGE=class_average,
            BOUNDED=bounded,
            **sizes.constants(math_mode),
            **sizes.options,
        )
        done += grid.splits
    return partials
