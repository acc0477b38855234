"""Training on a CPU whose threads wait passively, or spin: on a quiet machine, and beside other busy processes.

    python -m bench.training.threads --output bench/results/speed/cpu_threads.jsonl

Each round runs every case once: the trainer on the digits, with its threads waiting as the case says.
A figure is the images a second of an epoch, by metrics.jsonl; the first epoch warms up and does not count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from bench.rows import append, spread

Beside = Literal["python", "pytorch", "itself"]  # itself: as a sweep's workers, waiting as the measured run does
BUSY = {
    "python": "while True: pass",
    "pytorch": "import torch\na = torch.randn(256, 256)\nwhile True: a = (a @ a).clamp(0, 1)",  # its threads spin
}


class Case(NamedTuple):
    policy: str  # a variable of the environment that OpenMP reads; "default": none
    busy: int  # other processes
    beside: Beside


@dataclass
class Options:
    """How much to measure."""

    rounds: int = 5
    """Runs of each case."""
    epochs: int = 4
    """Of each run; all but the first count."""
    policies: tuple[str, ...] = ("default", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=10000")
    """What is set for OpenMP; default: nothing."""
    busy: tuple[int, ...] = (0, 1)
    """Other busy processes."""
    beside: Beside = "pytorch"
    """What these run: a loop of Python; products of PyTorch, whose threads wait by default; or the same training."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """One short round; the rows say so."""


def main(options: Options) -> None:
    rounds, epochs = (1, 2) if options.dry_run else (options.rounds, options.epochs)
    cases = [Case(policy, busy, options.beside) for busy, policy in itertools.product(options.busy, options.policies)]
    speeds: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            with busy_processes(case):
                speeds[case] += images_per_second(case.policy, epochs)
    for case, found in speeds.items():
        figures = spread("images_per_second", found if len(found) > 1 else found * 2)
        low, median, high = (figures[f"images_per_second{part}"] for part in ("_p20", "", "_p80"))
        print(f"{case.busy} busy beside, {case.policy}: {median:,.0f} images/s ({low:,.0f} to {high:,.0f})")
        append(options.output, [{**case._asdict(), "runs": rounds, **figures}], options.dry_run)


def images_per_second(policy: str, epochs: int) -> list[float]:
    """Trains once; returns the images a second of each epoch but the first."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(training(epochs, folder), env=environment_of(policy), check=True, capture_output=True)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["images_per_second"] for line in lines[1:]]


def training(epochs: int, output: str) -> list[str]:
    """Returns a command that trains as train/run.py does, but does not set the policy itself."""
    code = "from rcl_fast.train.config import parse; from rcl_fast.train.jobs import train; train.run(parse())"
    return [sys.executable, "-c", code, "--device", "cpu", "--epochs", str(epochs), "--output", output]


def environment_of(policy: str) -> dict[str, str]:
    """Returns this process's environment with that way to wait and no other."""
    without = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return without if policy == "default" else without | dict([policy.split("=")])


@contextlib.contextmanager
def busy_processes(case: Case) -> Iterator[None]:
    """Runs as many other processes as the case says, within a `with` block; they share nothing with the run."""
    alike = case.beside == "itself"
    environment = environment_of(case.policy if alike else "default")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as busy:
        for number in range(case.busy):
            command = training(10_000, f"{folder}/{number}") if alike else [sys.executable, "-c", BUSY[case.beside]]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            busy.callback(process.wait)
            busy.callback(process.kill)
        yield


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
