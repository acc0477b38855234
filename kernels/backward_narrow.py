"""Sums the gradient of a block of rows over a range of keys, in registers: for small D."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.pack import Packed
from rcl_fast.kernels.tiles import dlogits, load_key_side, load_row_side, load_rows


@triton.jit(do_not_specialize=["N", "M", "row_start", "row_end", "key_end", "tiles_per_split", "stride_grad_output"])
def backward_kernel(
    p_keys,  # [M, K] packed rows, the anchors first
    p_vectors,  # [4, M] scale, bias, count, 1 / power of two
    p_key_labels,  # [M]
    p_lse,  # [N] base 2, +inf without a positive
    p_grad_output,  # [N] g, any stride
    p_parts,  # [SPLITS, rows, K] out, float32; `project_kernel` makes the gradient of them
    N,
    M,
    row_start,  # rows [row_start, row_end) of the keys: the anchors [0, N) or the prototypes [N, M)
    row_end,
    key_end,  # keys [0, key_end): M for anchors; N for prototypes, which are no keys to each other
    tiles_per_split,
    stride_grad_output,
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,  # >= K
    PRECISION: tl.constexpr,
):
    i_rows, i_split = tl.program_id(0), tl.program_id(1)
    o_a = row_start + i_rows * ROWS + tl.arange(0, ROWS)
    m_a = o_a < row_end
    o_d = tl.arange(0, DEPTH)
    b_a = load_rows(p_keys, o_a, m_a, o_d, K)  # [ROWS, DEPTH]
    b_y_a, b_scale_a, b_term_a, b_share_a, b_g_a, b_lse_a, b_bias_a = load_row_side(
        p_vectors, p_key_labels, p_lse, p_grad_output, stride_grad_output, o_a, m_a, N, M,
        AVERAGE, BOUNDED,
    )  # fmt: skip

    b_grad = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    first = i_split * tiles_per_split
    for i_keys in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(key_end, KEYS))):
        o_k = i_keys * KEYS + tl.arange(0, KEYS)
        m_k = o_k < key_end
        b_k = load_rows(p_keys, o_k, m_k, o_d, K)  # [KEYS, DEPTH], for both products
        b_s = tl.dot(b_a, tl.trans(b_k), input_precision=PRECISION)  # [ROWS, KEYS]
        b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k = load_key_side(
            p_vectors, p_key_labels, p_lse, p_grad_output, stride_grad_output, o_k, m_k, N, M, BOUNDED
        )
        b_dlogits = dlogits(
            b_s, o_a, o_k, b_y_a, b_scale_a, b_term_a, b_share_a, b_g_a, b_lse_a, b_bias_a,
            b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k, AVERAGE, BOUNDED,
        )  # fmt: skip
        b_grad = tl.dot(b_dlogits.to(b_k.dtype), b_k, b_grad, input_precision=PRECISION)

    # Going through the norm here would save a launch, but its registers made wide rows spill.
    p_out = p_parts + i_split.to(tl.int64) * (row_end - row_start) * K + (o_a - row_start).to(tl.int64)[:, None] * K
    tl.store(p_out + o_d[None, :], b_grad, mask=m_a[:, None] & (o_d < K)[None, :])


def gradient_parts(
    packed: Packed,
    lse: Tensor,
    grad_output: Tensor,
    row_start: int,
    rows: int,
    key_end: int,
    average: bool,
    bounded: bool,
) -> Tensor:
    """Launches the kernel for rows [row_start, row_start + rows) of the keys; returns float32 [splits, rows, K].

    A split has the sum over one range of keys.
    """
    keys, vectors, labels = packed
    M, K = keys.shape
    arch, math_mode = block_sizes.product_of(keys)
    sizes = block_sizes.choose("backward", arch, math_mode, K, rows, key_end)
    row_blocks = triton.cdiv(rows, sizes.rows)
    splits, tiles_per_split = block_sizes.split(arch, row_blocks, triton.cdiv(key_end, sizes.keys))
    parts = torch.empty(splits, rows, K, dtype=torch.float32, device=keys.device)
    backward_kernel[(row_blocks, splits)](
        keys,
        vectors,
        labels,
        lse,
        grad_output,
        parts,
        len(lse),
        M,
        row_start,
        row_start + rows,
        key_end,
        tiles_per_split,
        grad_output.stride(0),
        K=K,
        AVERAGE=average,
        BOUNDED=bounded,
        **sizes.constants(math_mode),
        **sizes.options,
    )
    return parts
