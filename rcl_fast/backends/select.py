"""The backends by name."""

from __future__ import annotations

import torch

from rcl_fast.backends import dense, explain, reference, tiled
from rcl_fast.backends.protocol import Backend

_IN_PYTORCH: dict[str, Backend] = {"tiled": tiled, "dense": dense, "reference": reference}
BACKENDS = ("auto", "triton", *_IN_PYTORCH)


def get(name: str) -> Backend:
    """Returns the backend of this name, which "auto" is not. Raises ImportError for "triton" without Triton."""
    if name == "triton":
        from rcl_fast.backends import triton  # not every platform has Triton

        return triton
    return _IN_PYTORCH[name]


def automatic(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the name that "auto" stands for, which torch.compile takes for a constant."""
    if torch.compiler.is_compiling():
        from rcl_fast.backends import constant  # its decorator loads torch._dynamo, for seconds

        return constant.automatic(device, dtype)
    return explain.automatic(device, dtype)
