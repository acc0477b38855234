"""The file names of a run's checkpoints. This module does not import PyTorch."""

from __future__ import annotations

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
