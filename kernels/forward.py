"""Log-sum-exp and positives' sum of a block of anchors over a range of keys; the N×M similarities stay in registers."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.pack import Packed
from rcl_fast.kernels.tiles import load_rows, products, same_class_term


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split"])
def forward_kernel(
    p_keys,  # [M, K] packed rows, the anchors first
    p_vectors,  # [4, M] scale, bias, count, 1 / power of two
    p_key_labels,  # [M]
    p_partials,  # [SPLITS, 3, N] out: running maximum, sum of 2^(s + b − maximum), sum of s over the positives; base 2
    N,
    M,
    tiles_per_split,
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    BOUNDED: tl.constexpr,  # |s| is known to be small: no running maximum is needed
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_rows, i_split = tl.program_id(0), tl.program_id(1)
    o_a = i_rows * ROWS + tl.arange(0, ROWS)
    m_a = o_a < N
    b_y_a = tl.load(p_key_labels + o_a, mask=m_a, other=-2)
    b_scale_a = tl.load(p_vectors + o_a, mask=m_a, other=0.0)
    if AVERAGE:
        b_term_a = same_class_term(tl.load(p_vectors + 2 * M + o_a, mask=m_a, other=1.0))
    if K <= DEPTH:
        b_a = load_rows(p_keys, o_a, m_a, tl.arange(0, DEPTH), K)  # [ROWS, DEPTH], once for all keys

    # The running maximum starts at -1e38, not -inf, so that a fully masked tile gives 0 and not NaN.
    b_max = tl.full([ROWS], 0.0 if BOUNDED else -1e38, dtype=tl.float32)
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_positives = tl.zeros([ROWS], dtype=tl.float32)
    first = i_split * tiles_per_split
    for i_keys in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(M, KEYS))):
        o_k = i_keys * KEYS + tl.arange(0, KEYS)
        m_k = o_k < M
        if K <= DEPTH:
            b_k = load_rows(p_keys, o_k, m_k, tl.arange(0, DEPTH), K)  # [KEYS, DEPTH]
            b_s = tl.dot(b_a, tl.trans(b_k), input_precision=PRECISION)  # [ROWS, KEYS]
        else:
            b_s = products(p_keys, o_a, m_a, o_k, m_k, K, DEPTH, PRECISION)
        b_y_k = tl.load(p_key_labels + o_k, mask=m_k, other=-1)
        b_scale_k = tl.load(p_vectors + o_k, mask=m_k, other=0.0)
        b_bias_k = tl.load(p_vectors + M + o_k, mask=m_k, other=-float("inf"))  # −inf takes a masked key out

        b_s *= b_scale_a[:, None] * b_scale_k[None, :]
        same = b_y_a[:, None] == b_y_k[None, :]
        itself = o_a[:, None] == o_k[None, :]
        b_positives += tl.sum(tl.where(same & ~itself, b_s, 0.0), 1)
        if AVERAGE:
            b_s += tl.where(same, b_term_a[:, None], 0.0)
        if BOUNDED:
            b_sum += tl.sum(tl.where(itself, 0.0, tl.exp2(b_s)) * tl.exp2(b_bias_k)[None, :], 1)
        else:
            b_s = tl.where(itself, -float("inf"), b_s + b_bias_k[None, :])
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            b_sum = b_sum * tl.exp2(b_max - b_new_max) + tl.sum(tl.exp2(b_s - b_new_max[:, None]), 1)
            b_max = b_new_max

    p_out = p_partials + i_split.to(tl.int64) * 3 * N + o_a
    tl.store(p_out, b_max, mask=m_a)
    tl.store(p_out + N, b_sum, mask=m_a)
    tl.store(p_out + 2 * N, b_positives, mask=m_a)


def partial_sums(packed: Packed, rows: int, class_average: bool, bounded: bool) -> Tensor:
    """Launches the kernel for the first `rows` anchors; returns float32 [splits, 3, rows], a split for some keys."""
    keys, vectors, labels = packed
    M, K = vectors.shape[1], keys.shape[1]
    arch, math_mode = block_sizes.product_of(keys)
    sizes = block_sizes.choose("forward", arch, math_mode, K, rows, M)
    row_blocks = triton.cdiv(rows, sizes.rows)
    splits, tiles_per_split = block_sizes.split(arch, row_blocks, triton.cdiv(M, sizes.keys))
    partials = torch.empty(splits, 3, rows, dtype=torch.float32, device=keys.device)
    forward_kernel[(row_blocks, splits)](
        keys,
        vectors,
        labels,
        partials,
        rows,
        M,
        tiles_per_split,
        K=K,
        AVERAGE=class_average,
        BOUNDED=bounded,
        **sizes.constants(math_mode),
        **sizes.options,
    )
    return partials
