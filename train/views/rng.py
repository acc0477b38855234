"""A counter-based generator: uniform numbers as a pure function of (seed, epoch, index, view)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Uniform = Callable[[int], Tensor]
"""count -> float64 [B, count] in [0, 1), new numbers at every call."""


def uniforms(seed: int, epoch: int | Tensor, index: Tensor, view: int) -> Uniform:
    """Returns a generator of uniform numbers that has a stream of its own for each image of `index` int64 [B].

    The generator is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
    """
    key = _mix(_number(seed, index.device))
    for part in (_number(epoch, index.device), index.long(), _number(view, index.device)):
        key = _mix(key + _GAMMA * (part + 1))
    used, ahead = 0, torch.empty(len(index), 0, dtype=torch.float64, device=index.device)

    def uniform(count: int) -> Tensor:
        nonlocal used, ahead
        if count > ahead.shape[1]:  # many at once: a small tensor costs as much time as a large one
            first = used + ahead.shape[1] + 1
            steps = torch.arange(first, first + max(count, _AHEAD), device=index.device)
            bits = _mix(key[:, None] + _GAMMA * steps)
            ahead = torch.cat([ahead, _shifted(bits, 11).double() * 2.0**-53], 1)
        used += count
        numbers, ahead = ahead[:, :count], ahead[:, count:]
        return numbers

    return uniform


def _number(value: int | Tensor, device: torch.device) -> Tensor:
    """Returns the value as int64 [], made on the device: a copy to a GPU could not be part of a CUDA graph."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=device)


_AHEAD = 48


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


_GAMMA, _MULTIPLIERS = _signed(0x9E3779B97F4A7C15), (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(bits: Tensor) -> Tensor:
    """Returns SplitMix64's mix of the bits.

    int64 stands for unsigned 64-bit: products wrap alike, and shifts need the sign bits cleared.
    """
    bits = (bits ^ _shifted(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shifted(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & (2 ** (64 - by) - 1)


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform
