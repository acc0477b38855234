"""Sums the gradient of a block of rows over a range of keys, in registers: for small D."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.dlogits import dlogits, load_key_side, load_row_side
from rcl_fast.kernels.pack import Packed, Part
from rcl_fast.kernels.tiles import Keys, diagonal_tiles, load_tile


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_split"])
def backward_kernel(
    p_keys,  # [P, K] packed rows
    p_key_labels,  # [P]
    p_vectors,  # [6, P], see tiles.py
    p_weights,  # [5, P] where BOUNDED, else [2, P]; see dlogits.py
    p_parts,  # [SPLITS, rows, K] out, float32; `project_kernel` makes the gradient of them
    P,
    row_start,  # rows [row_start, row_start + rows) of the keys
    rows,
    key_start,
    tiles,  # of keys
    tiles_per_split,
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,  # >= K
    PRECISION: tl.constexpr,
):
    i_split = tl.program_id(1)
    o_a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_k, o_d = key_start + tl.arange(0, KEYS), tl.arange(0, DEPTH)
    row = row_start + tl.program_id(0) * ROWS
    keys = Keys(p_keys, p_key_labels, p_vectors, p_weights, P)
    b_a = load_tile(p_keys, row, 0, ROWS, DEPTH, K)  # [ROWS, DEPTH]
    a = load_row_side(keys, row_start + o_a, BOUNDED)

    b_grad = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    begin, end = diagonal_tiles(row, key_start, first, last, ROWS, KEYS)
    for i in range(first, last - (end - begin)):
        offset = tl.where(i < begin, i, i + end - begin) * KEYS
        b_k = load_tile(p_keys, key_start + offset, 0, KEYS, DEPTH, K)  # [KEYS, DEPTH], for both products
        b_s = tl.dot(b_a, tl.trans(b_k), input_precision=PRECISION)  # [ROWS, KEYS]
        b_dlogits = dlogits(b_s, a, load_key_side(keys, o_k + offset, BOUNDED), AVERAGE, BOUNDED, False)
        b_grad = tl.dot(b_dlogits.to(b_k.dtype), b_k, b_grad, input_precision=PRECISION)
    for i in range(begin, end):
        b_k = load_tile(p_keys, key_start + i * KEYS, 0, KEYS, DEPTH, K)
        b_s = tl.dot(b_a, tl.trans(b_k), input_precision=PRECISION)
        b_dlogits = dlogits(b_s, a, load_key_side(keys, o_k + i * KEYS, BOUNDED), AVERAGE, BOUNDED, True)
        b_grad = tl.dot(b_dlogits.to(b_k.dtype), b_k, b_grad, input_precision=PRECISION)

    # Going through the norm here would save a launch, but its registers made wide rows spill.
    p_out = p_parts + i_split.to(tl.int64) * rows * K + o_a.to(tl.int64)[:, None] * K
    tl.store(p_out + o_d[None, :], b_grad, mask=(o_a < rows)[:, None] & (o_d < K)[None, :])


def gradient_parts(packed: Packed, weights: Tensor, part: Part, class_average: bool, bounded: bool) -> Tensor:
    """Launches the kernel for a part of the gradient; returns float32 [splits, rows, K].

    A split has the sum over one range of keys.
    """
    keys, vectors, labels = packed
    P, K = keys.shape
    device, math_mode = block_sizes.product_of(keys)
    sizes, grid = block_sizes.choose("backward", device, math_mode, K, part.rows, part.keys)
    parts = torch.empty(grid.splits, part.rows, K, dtype=torch.float32, device=keys.device)
    backward_kernel[(grid.row_blocks, grid.splits)](
        keys,
        labels,
        vectors,
        weights,
        parts,
        P,
        part.row_start,
        part.rows,
        part.key_start,
        grid.tiles,
        grid.tiles_per_split,
        K=K,
        AVERAGE=class_average,
        BOUNDED=bounded,
        **sizes.constants(math_mode),
        **sizes.options,
    )
    return parts
