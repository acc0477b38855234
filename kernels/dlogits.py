"""The derivative of the loss by the logits of a tile, of both directions from one similarity (README.md)."""

# mypy: allow-untyped-defs
from typing import NamedTuple

import triton
import triton.language as tl

from rcl_fast.kernels.tiles import POSITIVES, SCALE, TERM, WEIGHT, online_logits

# Rows of the weights [5, P] that `backward_weights.py` writes where the loss is bounded, with x = g · 2^−lse.
X = tl.constexpr(0)
SHARE = tl.constexpr(1)  # g / |P|
SCALED_X = tl.constexpr(2)  # times the scale, like the two below
SCALED_WEIGHT = tl.constexpr(3)
SCALED_SHARE = tl.constexpr(4)
# And of [2, P] where it is not.
G = tl.constexpr(0)
LSE = tl.constexpr(1)


class BoundedSide(NamedTuple):
    """What `dlogits` reads of the rows of a tile, or of its keys: there x, weight and share are times the scale."""

    index: tl.tensor
    label: tl.tensor
    scale: tl.tensor
    term: tl.tensor  # read of the rows only
    x: tl.tensor  # g · 2^−lse
    weight: tl.tensor  # 2^b
    share: tl.tensor  # g / |P|


class OnlineSide(NamedTuple):
    """The same where the loss is not bounded."""

    index: tl.tensor
    label: tl.tensor
    scale: tl.tensor
    term: tl.tensor  # read of the rows only
    g: tl.tensor
    lse: tl.tensor
    bias: tl.tensor  # b
    positives: tl.tensor  # read of the rows only


@triton.jit
def load_row_side(keys, o_a, BOUNDED: tl.constexpr):
    """Loads what `dlogits` reads of each row."""
    label = tl.load(keys.p_labels + o_a)
    scale = tl.load(keys.p_vectors + SCALE * keys.P + o_a)
    term = tl.load(keys.p_vectors + TERM * keys.P + o_a)
    weight = tl.load(keys.p_vectors + WEIGHT * keys.P + o_a)
    if BOUNDED:
        x = tl.load(keys.p_weights + X * keys.P + o_a)
        share = tl.load(keys.p_weights + SHARE * keys.P + o_a)
        return BoundedSide(o_a, label, scale, term, x, weight, share)
    else:
        g = tl.load(keys.p_weights + G * keys.P + o_a)
        lse = tl.load(keys.p_weights + LSE * keys.P + o_a)
        positives = tl.load(keys.p_vectors + POSITIVES * keys.P + o_a)
        return OnlineSide(o_a, label, scale, term, g, lse, weight, positives)


@triton.jit
def load_key_side(keys, o_k, BOUNDED: tl.constexpr):
    """Loads what `dlogits` reads of each key; of one that is none weight is 0 (b = −∞), and so is its gradient."""
    label = tl.load(keys.p_labels + o_k)
    scale = tl.load(keys.p_vectors + SCALE * keys.P + o_k)
    if BOUNDED:
        x = tl.load(keys.p_weights + SCALED_X * keys.P + o_k)
        weight = tl.load(keys.p_weights + SCALED_WEIGHT * keys.P + o_k)
        share = tl.load(keys.p_weights + SCALED_SHARE * keys.P + o_k)
        return BoundedSide(o_k, label, scale, scale, x, weight, share)
    else:
        g = tl.load(keys.p_weights + G * keys.P + o_k)
        lse = tl.load(keys.p_weights + LSE * keys.P + o_k)
        bias = tl.load(keys.p_vectors + WEIGHT * keys.P + o_k)
        return OnlineSide(o_k, label, scale, scale, g, lse, bias, scale)


@triton.jit
def dlogits(b_s, a, k, AVERAGE: tl.constexpr, BOUNDED: tl.constexpr, ITSELF: tl.constexpr):
    """Returns (dL/dt_ak + dL/dt_ka) · scale_k [ROWS, KEYS]; times the raw rows z_k it is the gradient of row a, scaled.

    One similarity serves both directions. Within a class the same-class term and |P| are the same for a and k.
    ITSELF: the tile may hold an anchor with itself.
    """
    b_dlogits = _bounded(b_s, a, k, AVERAGE) if BOUNDED else _online(b_s, a, k, AVERAGE)
    if ITSELF:  # selected, not multiplied: the exponential of an anchor with itself may be infinite
        b_dlogits = tl.where(a.index[:, None] == k.index[None, :], 0.0, b_dlogits)
    return b_dlogits


@triton.jit
def _bounded(b_s, a, k, AVERAGE: tl.constexpr):
    """One exponential for both directions; nothing is infinite, so a product with 0 or 1 does for a choice."""
    same = tl.where(a.label[:, None] == k.label[None, :], 1.0, 0.0)
    b_t = b_s * (a.scale[:, None] * k.scale[None, :])
    if AVERAGE:
        b_t += same * a.term[:, None]
    b_p = tl.exp2(b_t) * (a.x[:, None] * k.weight[None, :] + k.x[None, :] * a.weight[:, None])
    return b_p - same * (a.share[:, None] * k.scale[None, :] + k.share[None, :])


@triton.jit
def _online(b_s, a, k, AVERAGE: tl.constexpr):
    """Two exponentials, of differences to lse."""
    same = a.label[:, None] == k.label[None, :]
    b_scales = a.scale[:, None] * k.scale[None, :]
    b_p_ak = tl.exp2(online_logits(b_s, b_scales, same, a.term, k.bias[None, :], AVERAGE) - a.lse[:, None])
    b_p_ka = tl.exp2(online_logits(b_s, b_scales, same, a.term, a.bias[:, None], AVERAGE) - k.lse[None, :])
    b_p = a.g[:, None] * b_p_ak + k.g[None, :] * b_p_ka
    b_share = 1 / tl.maximum(a.positives, 1)
    return (b_p - tl.where(same, (a.g[:, None] + k.g[None, :]) * b_share[:, None], 0.0)) * k.scale[None, :]
