"""Sums the parts of each row's gradient in order, then takes it through compression and normalisation."""

# mypy: allow-untyped-defs
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels.pack import Packed
from rcl_fast.kernels.tiles import INVERSE, SCALE, load_rows


@triton.jit(do_not_specialize=["row_start", "rows", "splits"])
def project_kernel(
    p_parts,  # [SPLITS, rows, K] float32
    p_keys,  # [P, K] raw rows over a power of two
    p_vectors,  # [6, P], see tiles.py
    p_grad_scale,  # [1] what the parts were multiplied by, with SCALED
    p_grad,  # [rows, D] out
    P,
    row_start,  # the first row's index among the keys
    rows,
    splits,
    D: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,  # >= K
):
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, DEPTH)
    m_r = o_r < rows
    b_grad = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for i_split in range(0, splits):
        b_grad += load_rows(p_parts + tl.cast(i_split, tl.int64) * rows * K, o_r, m_r, o_d, K)
    if SCALED:
        b_grad /= tl.load(p_grad_scale)
    b_z = load_rows(p_keys, row_start + o_r, m_r, o_d, K).to(tl.float32)
    b_scale = tl.load(p_vectors + SCALE * P + row_start + o_r, mask=m_r, other=0.0)
    # Both scales of `dlogits` hold √(log2(e)/T); log 2 leaves their product 1/T.
    p_inverse = p_vectors + INVERSE * P + row_start + o_r
    if NORMALIZE:  # the part along z goes, as length does not count; a zero row keeps all
        b_grad *= 0.6931471805599453 * b_scale[:, None]
        b_zz = tl.sum(b_z * b_z, 1)
        b_along = tl.where(b_zz > 0, tl.sum(b_z * b_grad, 1) / tl.where(b_zz > 0, b_zz, 1.0), 0.0)
        b_grad = (b_grad - b_z * b_along[:, None]) * tl.load(p_inverse, mask=m_r, other=1.0)[:, None]
    else:  # the scale holds the power of two, by which nothing is to be multiplied first
        b_grad *= 0.6931471805599453 * (b_scale * tl.load(p_inverse, mask=m_r, other=1.0))[:, None]
    offsets = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_grad + offsets, b_grad, mask=m_r[:, None] & (o_d < D)[None, :])


def project(
    out: Tensor, parts: Tensor, packed: Packed, grad_scale: Tensor | None, row_start: int, normalize: bool
) -> None:
    """Launches the kernel: makes out [rows, D], the gradients of keys from row_start on, of parts [splits, rows, K]."""
    keys, vectors, _ = packed
    (rows, D), K = out.shape, keys.shape[1]
    depth = triton.next_power_of_2(K)
    block = max(1, 2048 // depth)
    project_kernel[(triton.cdiv(rows, block),)](
        parts,
        keys,
        vectors,
        grad_scale,
        out,
        vectors.shape[1],
        row_start,
        rows,
        len(parts),
        D=D,
        K=K,
        NORMALIZE=normalize,
        SCALED=grad_scale is not None,
        ROWS=block,
        DEPTH=depth,
        num_warps=4,
    )
