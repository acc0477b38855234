"""Which loader a run takes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch

from rcl_fast.train.data.device_loader import DeviceLoader
from rcl_fast.train.data.draws import plan
from rcl_fast.train.data.loader import Loader, Reading
from rcl_fast.train.data.torchvision_loader import TorchvisionLoader

LoaderName = Literal["auto", "dali", "torchvision", "device"]


def choose(reading: Reading, device: torch.device) -> tuple[LoaderName, str | None]:
    """What "auto" is for these samples and views; a sentence where it is not the fastest there could be.

    Images in memory stay on the device. Files go through DALI for a GPU, through torchvision for a CPU, where it is the
    faster of the two (docs/data.md).
    """
    for kind in reading.kinds:
        try:
            plan(kind, reading.options)
        except ValueError as error:
            return "torchvision", f"--loader auto takes torchvision, which is slower: {error}"
    if isinstance(reading.samples.images, np.ndarray):
        return "device", None
    if device.type == "cpu":
        return "torchvision", None
    if has_dali():
        return "dali", None
    return "torchvision", (
        "--loader auto takes torchvision, which is slower, as DALI is not installed (pip install '.[dali]' in "
        "rcl_fast's folder, on Linux): the CPU alone decodes and augments, and a GPU may wait for it; each epoch's "
        "line says how long"
    )


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package that holds it
        return False


def build(name: LoaderName, reading: Reading, *, device: torch.device, workers: int) -> Loader:
    """The loader of that name. `workers`: processes of torchvision, threads of DALI.

    Raises ValueError where the loader does not do these samples or views, ImportError where DALI is missing.
    """
    if name == "torchvision":
        return TorchvisionLoader(reading, workers=workers, pin_memory=device.type == "cuda")
    if name == "device":
        return DeviceLoader(reading, device)
    if name == "dali":
        from rcl_fast.train.data.dali_loader import DaliLoader  # needs DALI, which is optional

        return DaliLoader(reading, device=device, threads=max(workers, 1))
    raise ValueError(f'there is no loader {name!r}: expected "dali", "torchvision" or "device"')
