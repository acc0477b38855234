"""Makes ℓ_i and lse_i of the splits' partial sums, added in the same order every time."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels.tiles import LOG_COUNT, POSITIVES


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    p_partials,  # [SPLITS, 3, rows]
    p_vectors,  # [6, P], see tiles.py
    p_loss,  # [rows] out, natural logarithm
    p_lse,  # [rows] out, base 2; +inf for an anchor without a positive, which makes its gradient 0
    rows,
    P,
    splits,
    ROWS: tl.constexpr,
):
    o_a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_a = o_a < rows
    b_max = tl.full([ROWS], -1e38, dtype=tl.float32)  # not -inf: see forward.py
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_positive_sum = tl.zeros([ROWS], dtype=tl.float32)
    for i_split in range(0, splits):
        p_in = p_partials + tl.cast(i_split, tl.int64) * 3 * rows + o_a
        b_split_max = tl.load(p_in, mask=m_a, other=-1e38)
        b_new_max = tl.maximum(b_max, b_split_max)
        b_sum = b_sum * tl.exp2(b_max - b_new_max) + tl.load(p_in + rows, mask=m_a, other=0.0) * tl.exp2(
            b_split_max - b_new_max
        )
        b_positive_sum += tl.load(p_in + 2 * rows, mask=m_a, other=0.0)
        b_max = b_new_max

    b_positives = tl.load(p_vectors + POSITIVES * P + o_a, mask=m_a, other=0.0)
    b_log_n = tl.load(p_vectors + LOG_COUNT * P + o_a, mask=m_a, other=0.0)
    has_positive = b_positives > 0
    b_lse = b_max + tl.log2(tl.where(has_positive, b_sum, 1.0))
    b_loss = (b_lse - b_positive_sum / tl.maximum(b_positives, 1) - b_log_n) * 0.6931471805599453  # log 2
    tl.store(p_loss + o_a, tl.where(has_positive, b_loss, 0.0), mask=m_a)
    tl.store(p_lse + o_a, tl.where(has_positive, b_lse, float("inf")), mask=m_a)


def combine(partials: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the kernel on partials [splits, 3, rows]; returns ℓ_i [rows], and lse_i [rows] in base 2."""
    (splits, _, rows), P = partials.shape, vectors.shape[1]
    loss = torch.empty(rows, dtype=torch.float32, device=partials.device)
    lse = torch.empty(rows, dtype=torch.float32, device=partials.device)
    combine_kernel[(triton.cdiv(rows, 128),)](partials, vectors, loss, lse, rows, P, splits, ROWS=128, num_warps=4)
    return loss, lse
