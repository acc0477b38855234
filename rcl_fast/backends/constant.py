"""The choice of "auto" under torch.compile. A module of its own: the decorator loads torch._dynamo, for seconds."""

from __future__ import annotations

import torch

from rcl_fast.backends import explain


@torch.compiler.assume_constant_result
def automatic(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend's name, which the compiled code keeps."""
    return explain.automatic(device, dtype)
