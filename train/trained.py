"""The earlier name of `rcl_fast.train.inference`."""

from __future__ import annotations

import warnings
from pathlib import Path

from rcl_fast.train import inference
from rcl_fast.train.inference import Trained
from rcl_fast.train.rundir import checkpoints


def load(run: Path | str, checkpoint: str = checkpoints.BEST) -> Trained:
    """Calls `rcl_fast.train.inference.load_run`, which replaces it, with a DeprecationWarning."""
    warnings.warn("trained.load is now rcl_fast.train.inference.load_run", DeprecationWarning, stacklevel=2)
    return inference.load_run(run, checkpoint)
