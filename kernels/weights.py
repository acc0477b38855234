"""The gradient's weights of a block of rows, written to a bounded workspace for a plain matrix product: for large D."""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from rcl_fast.kernels.tiles import gradient_weights, load_key_side, load_row_side, products


@triton.jit(do_not_specialize=["N", "M", "row_start", "row_end", "key_end", "stride_upstream"])
def weights_kernel(
    p_keys,  # [M, K] raw rows, the anchors first
    p_vectors,  # [3, M] scale, bias, count
    p_key_labels,  # [M]
    p_lse,  # [N] base 2, +inf without a positive
    p_upstream,  # [N] g, any stride
    p_weights,  # [row_end − row_start, key_stride] out, in the keys' dtype
    N,
    M,
    row_start,
    row_end,
    key_end,
    key_stride,  # key_end rounded up, so that every row of the workspace is aligned
    stride_upstream,
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
    b_y_a, b_scale_a, b_gain_a, b_share_a, b_g_a, b_lse_a, b_bias_a = load_row_side(
        p_vectors, p_key_labels, p_lse, p_upstream, stride_upstream, o_a, m_a, N, M,
        AVERAGE, BOUNDED,
    )  # fmt: skip
    # In two halves: a tile's worth of key vectors at once takes more registers than there are.
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_s, [ROWS, 2, KEYS // 2]), (0, 2, 1)))
    p_out = p_weights + (o_a - row_start).to(tl.int64)[:, None] * key_stride
    for half in tl.static_range(2):
        o_k = i_keys * KEYS + half * (KEYS // 2) + tl.arange(0, KEYS // 2)
        m_k = o_k < key_end
        b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k = load_key_side(
            p_vectors, p_key_labels, p_lse, p_upstream, stride_upstream, o_k, m_k, N, M, BOUNDED
        )
        b_w = gradient_weights(
            b_left if half == 0 else b_right, o_a, o_k,
            b_y_a, b_scale_a, b_gain_a, b_share_a, b_g_a, b_lse_a, b_bias_a,
            b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k, AVERAGE, BOUNDED,
        )  # fmt: skip
        tl.store(p_out + o_k[None, :], b_w.to(p_weights.dtype.element_ty), mask=m_a[:, None] & m_k[None, :])
