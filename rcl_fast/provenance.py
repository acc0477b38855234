"""Says what a figure came from, machine, versions and commit: every row of results carries it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch


def describe() -> dict[str, str | int]:
    """Returns machine, versions and commit, as plain values."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """Returns the working tree's commit, marked where the tree differs from it; a copy without git has RCL_COMMIT."""
    if "RCL_COMMIT" in os.environ:
        return os.environ["RCL_COMMIT"]
    here = Path(__file__).resolve().parent  # bench/gpu.sh imports it by way of a link
    show = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(show, cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
