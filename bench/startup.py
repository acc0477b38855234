"""What it costs to start: CPU seconds of an import, of --help, and of a typo, beside those of `import torch`.

    python -m bench.startup --output bench/results/speed/startup.jsonl

Each round starts every case once, as a process of its own. Its CPU time is user and system together, of the process and
of its children; its ratio is to `import torch` in the same round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench.rows import append, spread

ROOT = Path(__file__).parents[1]
BASE = "import torch"
CASES = {
    BASE: ["-c", "import torch"],
    "import rcl_fast": ["-c", "import rcl_fast"],
    "rcl_fast.contrastive_loss": ["-c", "import rcl_fast; rcl_fast.contrastive_loss"],
    "rcl_fast.ContrastiveLoss": ["-c", "import rcl_fast; rcl_fast.ContrastiveLoss"],
    "train/run.py --help": ["train/run.py", "--help"],
    "train/run.py --los bcl (a typo)": ["train/run.py", "--los", "bcl"],
    "train/run.py --lr 0 (no value)": ["train/run.py", "--lr", "0"],
    "train/sweep.py --help": ["train/sweep.py", "--help"],
    "train/reproduce.py --help": ["train/reproduce.py", "--help"],
    "train/verify.py --help": ["train/verify.py", "--help"],
    "train/second_stage.py --help": ["train/second_stage.py", "--help"],
    "the trainer": ["-c", "from rcl_fast.train.jobs import train"],
}


@dataclass
class Options:
    """How much to measure."""

    rounds: int = 7
    """Starts of each case."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """Two rounds; the rows say so."""


def main(options: Options) -> None:
    rounds = 2 if options.dry_run else options.rounds
    for case in CASES:  # writes what Python compiles, and fills the file system's cache
        cpu_seconds(case)
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            seconds[case].append(cpu_seconds(case))
    rows = []
    for case, measured in seconds.items():
        ratio = statistics.median(one / base for one, base in zip(measured, seconds[BASE], strict=True))
        rows.append({"case": case, "rounds": rounds, **spread("cpu_seconds", measured), "of_import_torch": ratio})
        print(f"{case:36} {rows[-1]['cpu_seconds']:6.2f} s  {ratio:5.2f} × {BASE}")
    append(options.output, rows, options.dry_run)


def cpu_seconds(case: str) -> float:
    """Starts a case once; returns its user and system time in seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    subprocess.run([sys.executable, *CASES[case]], cwd=ROOT, env=environment, capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
