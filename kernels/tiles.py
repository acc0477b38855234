"""What the kernels share: tiles of raw rows, their products, and the derivative of the loss by the logits."""

# mypy: allow-untyped-defs
import triton
import triton.language as tl


@triton.jit
def load_rows(p_rows, o_rows, m_rows, o_d, K: tl.constexpr):
    """Loads rows of a contiguous [., K] matrix; 64-bit offsets, as R·K passes 2^31 long before memory ends."""
    offsets = o_rows.to(tl.int64)[:, None] * K + o_d[None, :]
    return tl.load(p_rows + offsets, mask=m_rows[:, None] & (o_d < K)[None, :], other=0.0)


@triton.jit
def products(
    p_keys, o_a, m_a, o_k, m_k, K: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Returns z_a · z_k of raw rows, float32 [ROWS, KEYS], summed in steps of DEPTH features."""
    b_s = tl.zeros([o_a.shape[0], o_k.shape[0]], dtype=tl.float32)  # [ROWS, KEYS]
    for o in range(0, K, DEPTH):
        o_d = o + tl.arange(0, DEPTH)
        b_a = load_rows(p_keys, o_a, m_a, o_d, K)  # [ROWS, DEPTH]
        b_k = load_rows(p_keys, o_k, m_k, o_d, K)  # [KEYS, DEPTH]
        b_s = tl.dot(b_a, tl.trans(b_k), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def same_class_term(b_count):
    """Returns log2(count / (count − 1)), which b has more on keys of the anchor's class, as the anchor is left out."""
    return tl.log2(b_count / tl.maximum(b_count - 1, 1))


@triton.jit
def load_row_side(
    p_vectors, p_key_labels, p_lse, p_grad_output, stride_grad_output, o_a, m_a, N, M,
    AVERAGE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Loads what `dlogits` reads of each row: (label, similarity scale, same-class term, 1/|P|, g, lse, b)."""
    b_y = tl.load(p_key_labels + o_a, mask=m_a, other=-2)
    b_scale = tl.load(p_vectors + o_a, mask=m_a, other=0.0)
    b_bias = tl.load(p_vectors + M + o_a, mask=m_a, other=0.0)
    b_count = tl.load(p_vectors + 2 * M + o_a, mask=m_a, other=1.0)
    b_term = tl.zeros_like(b_count)
    if AVERAGE:
        b_term = same_class_term(b_count)
    b_share = 1 / tl.maximum(b_count - 1, 1)
    b_g, b_lse = load_anchor_side(p_lse, p_grad_output, stride_grad_output, o_a, m_a, N)
    if BOUNDED:
        b_lse = b_g * tl.exp2(-b_lse)
        b_bias = tl.exp2(b_bias)
    return b_y, b_scale, b_term, b_share, b_g, b_lse, b_bias


@triton.jit
def load_key_side(
    p_vectors, p_key_labels, p_lse, p_grad_output, stride_grad_output, o_k, m_k, N, M,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Loads what `dlogits` reads of each key: (label, scale, g, lse, b); b = −inf gives a masked key probability 0."""
    b_y = tl.load(p_key_labels + o_k, mask=m_k, other=-1)
    b_scale = tl.load(p_vectors + o_k, mask=m_k, other=0.0)
    b_bias = tl.load(p_vectors + M + o_k, mask=m_k, other=-float("inf"))
    b_g, b_lse = load_anchor_side(p_lse, p_grad_output, stride_grad_output, o_k, m_k, N)
    if BOUNDED:
        b_lse = b_g * tl.exp2(-b_lse)
        b_bias = tl.exp2(b_bias)
    return b_y, b_scale, b_g, b_lse, b_bias


@triton.jit
def load_anchor_side(p_lse, p_grad_output, stride_grad_output, o_rows, m_rows, N):
    """Loads (g, lse) of rows; a prototype, like an anchor without a positive, has g = 0 and lse = +inf."""
    m_anchor = m_rows & (o_rows < N)
    b_lse = tl.load(p_lse + o_rows, mask=m_anchor, other=float("inf"))
    b_g = tl.load(p_grad_output + o_rows.to(tl.int64) * stride_grad_output, mask=m_anchor, other=0.0)
    return tl.where(b_lse == float("inf"), 0.0, b_g), b_lse


@triton.jit
def dlogits(
    b_s, o_a, o_k, b_y_a, b_scale_a, b_term_a, b_share_a, b_g_a, b_lse_a, b_bias_a,
    b_y_k, b_scale_k, b_g_k, b_lse_k, b_bias_k, AVERAGE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Returns (dL/dt_ak + dL/dt_ka) · scale_k [ROWS, KEYS]; times the raw rows z_k it is the gradient of row a, scaled.

    One similarity serves both directions. Within a class the same-class term and 1/|P| are the same for a and k.
    BOUNDED: lse holds g · 2^−lse and bias 2^b, so that both probabilities come from one exponential.
    """
    b_t = b_s * (b_scale_a[:, None] * b_scale_k[None, :])
    same = b_y_a[:, None] == b_y_k[None, :]
    if AVERAGE:
        b_t += tl.where(same, b_term_a[:, None], 0.0)
    if BOUNDED:
        b_dlogits = tl.exp2(b_t) * (b_lse_a[:, None] * b_bias_k[None, :] + b_lse_k[None, :] * b_bias_a[:, None])
    else:
        # First s + b, as the forward pass rounded it, so that a dominant key's probability is 1 and no bit more.
        b_p_ak = tl.exp2(b_t + b_bias_k[None, :] - b_lse_a[:, None])
        b_p_ka = tl.exp2(b_t + b_bias_a[:, None] - b_lse_k[None, :])
        b_dlogits = b_g_a[:, None] * b_p_ak + b_g_k[None, :] * b_p_ka
    b_dlogits -= tl.where(same, (b_g_a[:, None] + b_g_k[None, :]) * b_share_a[:, None], 0.0)
    # Selected, not multiplied: the exponential of an anchor with itself may be infinite.
    return tl.where(o_a[:, None] == o_k[None, :], 0.0, b_dlogits) * b_scale_k[None, :]
