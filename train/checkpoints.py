"""Checkpoints: written atomically, read without executing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

LAST, BEST = "last.pt", "best.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values so that `path` is at any moment the old file or the new one, never half of one."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises SystemExit with what is wrong with the file."""
    if not path.is_file():
        raise SystemExit(f"no checkpoint {path}; a run writes {LAST} before its first epoch and after each")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise SystemExit(f"{path} can't be read as a checkpoint ({error}); is it damaged?") from error
