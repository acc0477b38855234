"""The GPUs that the command line names for the queue."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from rcl_fast.train.errors import refuse


def visible_devices() -> list[str]:
    """Returns the GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES of a child process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def check_devices(devices: Sequence[str] | None) -> None:
    """Raises UserError for a GPU that is not there or is named twice: its runs would go to the CPU, or wait."""
    if devices is None:
        return
    there = visible_devices()
    # A long name, like GPU-8932f937, is left to CUDA: PyTorch numbers its devices.
    missing = [name for name in devices if name not in there and not (there and name.startswith(("GPU-", "MIG-")))]
    refuse(
        {
            f"--devices {' '.join(missing)}: there are {', '.join(there) or 'no GPUs here'}": bool(missing),
            f"--devices {' '.join(devices)}: each GPU once": len(set(devices)) < len(devices),
        }
    )
