"""The runtime of the network: device, precision, memory layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.train.errors import UserError
from rcl_fast.train.options import RunOptions
from rcl_fast.train.runtime import distributed, threads

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime(NamedTuple):
    """A device, the name of autocast's precision there, and the memory layout of images."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Returns a scaler of the loss for fp16, where small gradients would vanish; otherwise it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def images(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.to(self.device, non_blocking=True)


def choose_runtime(options: RunOptions) -> Runtime:
    """Returns the runtime of the options, under torchrun this process's; raises UserError for a missing device."""
    local_rank = distributed.local_rank()
    device = _device(options.device) if local_rank is None else _device_of_process(options.device, local_rank)
    if device.type == "cpu":
        threads.share_cpus()
    precision = _best_precision(device) if options.precision == "auto" else options.precision
    torch.backends.cudnn.benchmark = True  # steps have the same shapes, so the search for fast convolutions pays off
    return Runtime(device, precision, torch.channels_last if options.channels_last else torch.contiguous_format)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {error}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices to PyTorch")
    return device


def _device_of_process(name: str, local_rank: int) -> torch.device:
    """Returns the GPU with this process's number on its machine, or the CPU. Raises UserError where there is none."""
    device = _device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(f"--device {name} is one GPU for several processes: give cuda, and each takes its own")
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise UserError(f"process {local_rank} of this machine has no GPU, it shows {there}: --nproc-per-node {there}")
    return torch.device("cuda", local_rank)


def _best_precision(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    # Before sm_80 PyTorch emulates bf16, and is_bf16_supported() calls that supported.
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
