"""Makes ℓ_i and lse_i of the splits' partial sums, added in the same order every time."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "M", "splits"])
def combine_kernel(
    p_partials,  # [SPLITS, 3, N]
    p_vectors,  # [4, M] scale, bias, count, 1 / power of two
    p_loss,  # [N] out, natural logarithm
    p_lse,  # [N] out, base 2; +inf for an anchor without a positive, which makes its gradient 0
    N,
    M,
    splits,
    AVERAGE: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_a = o_a < N
    b_max = tl.full([ROWS], -1e38, dtype=tl.float32)  # not -inf: see forward.py
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_positives = tl.zeros([ROWS], dtype=tl.float32)
    for i_split in range(0, splits):
        p_in = p_partials + tl.cast(i_split, tl.int64) * 3 * N + o_a
        b_split_max = tl.load(p_in, mask=m_a, other=-1e38)
        b_new_max = tl.maximum(b_max, b_split_max)
        b_sum = b_sum * tl.exp2(b_max - b_new_max) + tl.load(p_in + N, mask=m_a, other=0.0) * tl.exp2(
            b_split_max - b_new_max
        )
        b_positives += tl.load(p_in + 2 * N, mask=m_a, other=0.0)
        b_max = b_new_max

    b_count = tl.load(p_vectors + 2 * M + o_a, mask=m_a, other=1.0)
    b_log_n = tl.load(p_vectors + M + o_a, mask=m_a, other=0.0)
    if AVERAGE:  # b without its −log2 count is log2 n
        b_log_n += tl.log2(b_count)
    has_positive = b_count > 1
    b_lse = b_max + tl.log2(tl.where(has_positive, b_sum, 1.0))
    b_loss = (b_lse - b_positives / tl.maximum(b_count - 1, 1) - b_log_n) * 0.6931471805599453  # log 2
    tl.store(p_loss + o_a, tl.where(has_positive, b_loss, 0.0), mask=m_a)
    tl.store(p_lse + o_a, tl.where(has_positive, b_lse, float("inf")), mask=m_a)


def combine(partials: Tensor, vectors: Tensor, class_average: bool) -> tuple[Tensor, Tensor]:
    """Launches the kernel on partials [splits, 3, rows]; returns ℓ_i [rows], and lse_i [rows] in base 2."""
    (splits, _, rows), M = partials.shape, vectors.shape[1]
    loss = torch.empty(rows, dtype=torch.float32, device=partials.device)
    lse = torch.empty(rows, dtype=torch.float32, device=partials.device)
    combine_kernel[(triton.cdiv(rows, 128),)](
        partials, vectors, loss, lse, rows, M, splits, AVERAGE=class_average, ROWS=128, num_warps=4
    )
    return loss, lse
