"""Makes what the backward pass reads of each row and key, beside the packed vectors, from lse and grad_output."""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from rcl_fast.kernels.dlogits import LSE, SCALED_SHARE, SCALED_WEIGHT, SCALED_X, SHARE, G, X
from rcl_fast.kernels.pack import Packed
from rcl_fast.kernels.tiles import POSITIVES, SCALE, WEIGHT


@triton.jit(do_not_specialize=["anchors", "stride_grad_output"])
def weights_kernel(
    p_lse,  # [N] base 2, +inf without a positive
    p_grad_output,  # [N] g, any stride
    p_grad_scale,  # [1] what g is multiplied by, with SCALED
    p_vectors,  # [6, P], see tiles.py
    p_weights,  # [5, P] out where BOUNDED, else [2, P]; see dlogits.py
    anchors,  # the first so many rows; g of all others counts as 0
    P,
    stride_grad_output,
    BOUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m, m_anchor = o < P, o < anchors
    b_lse = tl.load(p_lse + o, mask=m_anchor, other=float("inf"))
    b_g = tl.load(p_grad_output + o.to(tl.int64) * stride_grad_output, mask=m_anchor, other=0.0)
    if SCALED:
        b_g *= tl.load(p_grad_scale)
    b_g = tl.where(b_lse == float("inf"), 0.0, b_g)  # a key that is no anchor has no loss, like one without a positive
    if BOUNDED:
        b_scale = tl.load(p_vectors + SCALE * P + o, mask=m, other=0.0)
        b_weight = tl.load(p_vectors + WEIGHT * P + o, mask=m, other=0.0)
        b_x = b_g * tl.exp2(-b_lse)
        b_share = b_g / tl.maximum(tl.load(p_vectors + POSITIVES * P + o, mask=m, other=1.0), 1)
        tl.store(p_weights + X * P + o, b_x, mask=m)
        tl.store(p_weights + SHARE * P + o, b_share, mask=m)
        tl.store(p_weights + SCALED_X * P + o, b_x * b_scale, mask=m)
        tl.store(p_weights + SCALED_WEIGHT * P + o, b_weight * b_scale, mask=m)
        tl.store(p_weights + SCALED_SHARE * P + o, b_share * b_scale, mask=m)
    else:
        tl.store(p_weights + G * P + o, b_g, mask=m)
        tl.store(p_weights + LSE * P + o, b_lse, mask=m)


def gradient_weights(
    packed: Packed, lse: Tensor, grad_output: Tensor, grad_scale: Tensor | None, anchors: int, bounded: bool
) -> Tensor:
    """Launches the kernel for the losses of the first so many anchors; returns float32 [5 or 2, P]."""
    P = packed.vectors.shape[1]
    weights = torch.empty(5 if bounded else 2, P, dtype=torch.float32, device=lse.device)
    weights_kernel[(triton.cdiv(P, 128),)](
        lse,
        grad_output,
        grad_scale,
        packed.vectors,
        weights,
        anchors,
        P,
        grad_output.stride(0),
        BOUNDED=bounded,
        SCALED=grad_scale is not None,
        ROWS=128,
        num_warps=4,
    )
    return weights
