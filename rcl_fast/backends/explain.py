"""Which backend "auto" stands for, and why."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion


class Choice(NamedTuple):
    """A backend's name and the reason for it, as a clause."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def explain_backend(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Choice:
    """Returns what `backend="auto"` takes for features of `dtype` on `device` (default: the GPU where there is one).

    "triton" on NVIDIA GPUs from sm_80 (A100) on, whose tensor cores Triton programs; "tiled" everywhere else. With
    prototypes of another dtype, `dtype` is the one that PyTorch promotes both to. Raises RuntimeError for a device that
    PyTorch does not know.

    >>> print(rcl_fast.explain_backend("cpu"))
    tiled: the features are on the CPU, and the kernels run on GPUs
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        return Choice("tiled", "the features are on the CPU, and the kernels run on GPUs")
    if dtype == torch.float64:
        return Choice("tiled", "the features are float64, and the kernels accumulate in float32")
    if device.type != "cuda" or torch.version.hip is not None:
        where = "ROCm" if device.type == "cuda" else device.type
        return Choice("tiled", f'the kernels have not been tried on {where}; backend="triton" runs them there')
    if not torch.cuda.is_available():
        return Choice("tiled", "PyTorch sees no GPU here")
    if find_spec("triton") is None:
        return Choice("tiled", "Triton is not installed")
    major, minor = torch.cuda.get_device_capability(device)
    name = f"the GPU is of generation sm_{major}{minor}"
    if major < 8:
        return Choice("tiled", f"{name}, and Triton uses tensor cores from sm_80 on; cuBLAS uses this one's")
    if major >= 11 and _triton_version() < "3.3.1":
        return Choice("tiled", f"{name}, and Triton before 3.3.1 makes no products for it; PyTorch 2.7.1 brings that")
    return Choice("triton", f"{name}, and Triton uses tensor cores from sm_80 on")


def _triton_version() -> TorchVersion:
    import triton  # not every platform has it

    return TorchVersion(triton.__version__)


def automatic(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the name, and works it out once: that takes a microsecond of each call."""
    if (device, dtype) not in _KNOWN:
        _KNOWN[device, dtype] = explain_backend(device, dtype).backend
    return _KNOWN[device, dtype]


_KNOWN: dict[tuple[torch.device, torch.dtype], str] = {}
