"""Writes dL/dlogits of a block of rows to a bounded workspace, for a matrix product with the keys: for large D."""

# mypy: allow-untyped-defs
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.pack import Packed
from rcl_fast.kernels.tiles import dlogits, load_key_side, load_row_side, products

# Products of 16-bit matrices into float32: cuBLAS, from PyTorch 2.8 on.
_MIXED_PRODUCTS = torch.__version__ >= "2.8" and torch.version.cuda is not None


@triton.jit(do_not_specialize=["N", "M", "row_start", "row_end", "key_end", "stride_grad_output"])
def dlogits_kernel(
    p_keys,  # [M, K] packed rows, the anchors first
    p_vectors,  # [4, M] scale, bias, count, 1 / power of two
    p_key_labels,  # [M]
    p_lse,  # [N] base 2, +inf without a positive
    p_grad_output,  # [N] g, any stride
    p_dlogits,  # [row_end − row_start, key_stride] out, in the keys' dtype
    N,
    M,
    row_start,
    row_end,
    key_end,
    key_stride,  # key_end rounded up, so that every row of the workspace is aligned
    stride_grad_output,
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_rows, i_keys = tl.program_id(0), tl.program_id(1)
    o_a = row_start + i_rows * ROWS + tl.arange(0, ROWS)
    o_k = i_keys * KEYS + tl.arange(0, KEYS)
    m_a = o_a < row_end
    m_k = o_k < key_end
    b_s = products(p_keys, o_a, m_a, o_k, m_k, K, DEPTH, PRECISION)  # [ROWS, KEYS]
    b_y_a, b_scale_a, b_term_a, b_share_a, b_g_a, b_lse_a, b_bias_a = load_row_side(
        p_vectors, p_key_labels, p_lse, p_grad_output, stride_grad_output, o_a, m_a, N, M,
        AVERAGE, BOUNDED,
    )  # fmt: skip
    # In two halves: a tile's worth of key vectors at once takes more registers than there are.
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_s, [ROWS, 2, KEYS // 2]), (0, 2, 1)))
    p_out = p_dlogits + (o_a - row_start).to(tl.int64)[:, None] * key_stride
    for half in tl.static_range(2):
        o_k = i_keys * KEYS + half * (KEYS // 2) + tl.arange(0, KEYS // 2)
        m_k = o_k < key_end
        b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k = load_key_side(
            p_vectors, p_key_labels, p_lse, p_grad_output, stride_grad_output, o_k, m_k, N, M, BOUNDED
        )
        b_dlogits = dlogits(
            b_left if half == 0 else b_right, o_a, o_k,
            b_y_a, b_scale_a, b_term_a, b_share_a, b_g_a, b_lse_a, b_bias_a,
            b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k, AVERAGE, BOUNDED,
        )  # fmt: skip
        tl.store(p_out + o_k[None, :], b_dlogits.to(p_dlogits.dtype.element_ty), mask=m_a[:, None] & m_k[None, :])


def gradient_chunks(
    packed: Packed,
    lse: Tensor,
    grad_output: Tensor,
    row_start: int,
    rows: int,
    key_end: int,
    average: bool,
    bounded: bool,
) -> Iterator[tuple[int, Tensor]]:
    """Launches the kernel for rows [row_start, row_start + rows) of the keys, as many at once as the workspace holds.

    Yields (first row, its gradients float32 [chunk, K]) for each chunk; rows count from row_start.
    """
    keys, vectors, labels = packed
    M, K = keys.shape
    arch, math_mode = block_sizes.product_of(keys)
    key_stride = triton.cdiv(key_end, 16) * 16
    rows_that_fit = block_sizes.WORKSPACE_BYTES // (key_stride * keys.element_size())
    chunk = min(rows, max(128, rows_that_fit // 128 * 128))
    workspace = torch.empty(chunk, key_stride, dtype=keys.dtype, device=keys.device)
    for start in range(0, rows, chunk):
        end = min(start + chunk, rows)
        sizes = block_sizes.choose("dlogits", arch, math_mode, K, end - start, key_end)
        dlogits_kernel[(triton.cdiv(end - start, sizes.rows), triton.cdiv(key_end, sizes.keys))](
            keys,
            vectors,
            labels,
            lse,
            grad_output,
            workspace,
            len(lse),
            M,
            row_start + start,
            row_start + end,
            key_end,
            key_stride,
            grad_output.stride(0),
            K=K,
            AVERAGE=average,
            BOUNDED=bounded,
            **sizes.constants(math_mode),
            **sizes.options,
        )
        yield start, _float32_product(workspace[: end - start, :key_end], keys[:key_end])


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right, accumulated in float32; the caller's autocast must not round it to 16 bits."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != torch.float32 and _MIXED_PRODUCTS and left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
