"""The files of a run's checkpoints, seen from outside. This module does not import PyTorch."""

from __future__ import annotations

import zipfile
from pathlib import Path

LAST = "last.pt"
"""After the last whole epoch."""
PREVIOUS = "previous.pt"
"""What LAST was before: the one to go on from where LAST turns out damaged."""
MID_EPOCH = "mid_epoch.pt"
"""Between two steps: every few minutes, and where a signal stopped the run."""
BEST = "best.pt"
"""After the epoch that was best on validation."""


def exist(folder: Path) -> bool:
    """Returns whether the folder has a checkpoint to go on from, which may be damaged."""
    return any((folder / name).exists() for name in (MID_EPOCH, LAST, PREVIOUS))


def damage(path: Path) -> str | None:
    """Returns what is wrong with the file; None where every checksum in it is right."""
    if not path.is_file():
        return "there is no such file"
    try:
        with zipfile.ZipFile(path) as file:  # torch.load would not notice a flipped bit
            wrong = file.testzip()
    except Exception as error:  # zipfile raises many kinds
        return str(error).partition("\n")[0] or type(error).__name__
    return None if wrong is None else f"the checksum of {wrong} in it is wrong"
