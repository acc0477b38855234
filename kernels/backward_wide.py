"""Writes dL/dlogits of a block of rows to a bounded workspace, for a matrix product with the keys: for large D."""

# mypy: allow-untyped-defs
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.dlogits import dlogits, load_key_side, load_row_side
from rcl_fast.kernels.pack import Packed, Part
from rcl_fast.kernels.tiles import Keys, products

# Products of 16-bit matrices into float32: cuBLAS, from PyTorch 2.8 on.
_MIXED_PRODUCTS = torch.__version__ >= "2.8" and torch.version.cuda is not None


@triton.jit(do_not_specialize=["rows", "key_end"])
def dlogits_kernel(
    p_keys,  # [P, K] packed rows
    p_key_labels,  # [P]
    p_vectors,  # [6, P], see tiles.py
    p_weights,  # [5, P] where BOUNDED, else [2, P]; see dlogits.py
    p_dlogits,  # [rows, key_stride] out, in the keys' dtype
    P,
    row_start,  # rows [row_start, row_start + rows) of the keys
    rows,
    key_start,  # keys [key_start, key_end)
    key_end,
    key_stride,  # as many, rounded up, so that every row of the workspace is aligned
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, key = row_start + tl.program_id(0) * ROWS, key_start + tl.program_id(1) * KEYS
    keys = Keys(p_keys, p_key_labels, p_vectors, p_weights, P)
    b_s = products(p_keys, row, key, ROWS, KEYS, DEPTH, K, PRECISION)  # [ROWS, KEYS]
    a = load_row_side(keys, row_start + o_a, BOUNDED)
    # In two halves: a tile's worth of key vectors at once takes more registers than there are.
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_s, [ROWS, 2, KEYS // 2]), (0, 2, 1)))
    p_out = p_dlogits + o_a.to(tl.int64)[:, None] * key_stride
    for half in tl.static_range(2):
        o_k = key + half * (KEYS // 2) + tl.arange(0, KEYS // 2)
        k = load_key_side(keys, o_k, BOUNDED)
        b_dlogits = dlogits(b_left if half == 0 else b_right, a, k, AVERAGE, BOUNDED, True)
        mask = (o_a < rows)[:, None] & (o_k < key_end)[None, :]
        tl.store(p_out + (o_k - key_start)[None, :], b_dlogits.to(p_dlogits.dtype.element_ty), mask=mask)


def gradient_chunks(
    packed: Packed, weights: Tensor, part: Part, class_average: bool, bounded: bool
) -> Iterator[tuple[int, Tensor]]:
    """Launches the kernel for a part of the gradient, for as many rows at once as the workspace holds.

    Yields (first row, its gradients float32 [chunk, K]) for each chunk; rows count from the part's first.
    """
    keys, vectors, labels = packed
    P, K = keys.shape
    device, math_mode = block_sizes.product_of(keys)
    key_stride = triton.cdiv(part.keys, 16) * 16
    rows_that_fit = block_sizes.WORKSPACE_BYTES // (key_stride * keys.element_size())
    chunk = min(part.rows, max(block_sizes.ALIGNMENT, rows_that_fit // block_sizes.ALIGNMENT * block_sizes.ALIGNMENT))
    workspace = torch.empty(chunk, key_stride, dtype=keys.dtype, device=keys.device)
    key_end = part.key_start + part.keys
    for start in range(0, part.rows, chunk):
        rows = min(chunk, part.rows - start)
        for sizes, grid, first_key in block_sizes.launches("dlogits", device, math_mode, K, rows, part.keys):
            dlogits_kernel[(grid.row_blocks, grid.splits)](
                keys,
                labels,
                vectors,
                weights,
                workspace[:, first_key:],
                P,
                part.row_start + start,
                rows,
                part.key_start + first_key,
                key_end,
                key_stride,
                K=K,
                AVERAGE=class_average,
                BOUNDED=bounded,
                **sizes.constants(math_mode),
                **sizes.options,
            )
        yield start, _float32_product(workspace[:rows, : part.keys], keys[part.key_start : key_end])


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right, accumulated in float32; the caller's autocast must not round it to 16 bits."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != torch.float32 and _MIXED_PRODUCTS and left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
