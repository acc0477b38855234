"""The state of every random generator that a network or a loader may use."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def state(device: torch.device) -> dict[str, Any]:
    """Returns the state of torch (CPU and this process's GPU), Python and NumPy, as tensors and plain values."""
    name, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002  # the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *position),
    }


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Restores the state afterwards: the random numbers used inside come again."""
    before = state(device)
    yield
    restore(before, device)


def restore(saved: dict[str, Any], device: torch.device) -> None:
    """Restores what `state` returned; a GPU's generator stays as it is where that was the state of a CPU."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)
    random.setstate(saved["python"])
    name, keys, *position = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002


def is_one(saved: Any) -> bool:
    """Returns whether `restore` can restore what was saved, of the CPU's generators."""
    cpu = torch.device("cpu")
    with preserved(cpu):
        try:
            restore(saved, cpu)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # each generator has its own
            return False
    return True
