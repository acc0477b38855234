"""CIFAR runs from start to end: seconds and accuracy of each way to take steps, and of several runs at once.

    python -m bench.training.cifar --data DIR --output FILE    a GPU: 200 epochs of CIFAR-100-LT, BCL+RCL, 3 seeds
    python -m bench.training.cifar --data DIR --output FILE --ways graph_compiled --at-once 1 2 4    how many fill it
    python -m bench.training.cifar --dry-run                     handwritten digits on any machine: proves the script

Each run is `train/run.py` as users start it, so the seconds hold everything: imports, reading images, compilation, each
epoch's validation and checkpoint, the test and the report. torch.compile keeps what it has compiled on the disk: a row
says whether an earlier run of this call may have left it there. A seed runs all ways before the next one, for a machine
that slows down meanwhile to slow all of them; runs at once have a seed each and share the GPU as processes do,
in turns, or, with NVIDIA's MPS started beforehand, side by side.
"""

from __future__ import annotations

import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from bench.rows import append
from rcl_fast.train import run

Way = Literal["plain", "compiled", "graph", "graph_compiled"]
FLAGS: dict[Way, list[str]] = {
    "plain": [],
    "compiled": ["--compile"],
    "graph": ["--cuda-graph"],
    "graph_compiled": ["--cuda-graph", "--compile"],
}


@dataclass
class Options:
    """What to run."""

    data: Path | None = None
    """Folder of the data set."""
    dataset: Literal["cifar100_lt", "cifar10_lt", "digits_lt"] = "cifar100_lt"
    """Data set and recipe."""
    loss: str = "bcl_rcl"
    """Loss."""
    ways: tuple[Way, ...] = ("plain", "compiled", "graph", "graph_compiled")
    """How steps are taken: one operation after the other, with --compile, with --cuda-graph, with both."""
    seeds: int = 3
    """So many of each way, one run after the other."""
    first_seed: int = 0
    """The first of them; the others follow it. To add to rows that are there."""
    at_once: tuple[int, ...] = (1,)
    """How many runs at the same time; more than one: once, with as many seeds."""
    epochs: int | None = None
    """Epochs; None: the recipe's."""
    more: str = ""
    """Any other options of train/run.py, the same for all runs."""
    keep: Path | None = None
    """Folder in which the runs stay, in WAY-SEED[-N-at-once]; None: they are deleted once their figures are read."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """Two epochs of handwritten digits, without CUDA graphs, and rows that say so: proves the script."""


def main(options: Options) -> None:
    if options.dry_run:
        options = replace(options, dataset="digits_lt", ways=("plain",), seeds=1, at_once=(1, 2), epochs=2, data=None)
    rows: list[dict[str, Any]] = []
    for seeds in groups(options):
        for way in options.ways:
            rows.append(measured(way, seeds, options, is_first=all(row["way"] != way for row in rows)))
            append(options.output, rows[-1:], options.dry_run)
    Console(width=110).print(table(rows))


def groups(options: Options) -> list[list[int]]:
    """Returns the groups of seeds that run together."""
    first, found = options.first_seed, []
    for at_once in options.at_once:
        if at_once == 1:
            found += [[seed] for seed in range(first, first + options.seeds)]
        else:
            found.append(list(range(first, first + at_once)))
    return found


def measured(way: Way, seeds: list[int], options: Options, is_first: bool) -> dict[str, Any]:
    """Runs all seeds at the same time; returns their row. Raises SystemExit where one fails."""
    with tempfile.TemporaryDirectory() as temporary:
        together = f"-{len(seeds)}-at-once" if len(seeds) > 1 else ""
        folders = [(options.keep or Path(temporary)) / f"{way}-{seed}{together}" for seed in seeds]
        began = time.perf_counter()
        processes = [start(way, seed, into, options) for seed, into in zip(seeds, folders, strict=True)]
        statuses = waited(processes)
        seconds = time.perf_counter() - began
        for status, into in zip(statuses, folders, strict=True):
            if status:
                raise SystemExit(f"{way} failed:\n{into.with_suffix('.log').read_text(encoding='utf-8')[-2000:]}")
        found = [json.loads((into / "metrics.json").read_text(encoding="utf-8")) for into in folders]
    names = ("balanced_accuracy", "last_epoch_balanced_accuracy", "harmonic_mean", "images_per_second", "selected_on")
    row = {
        "way": way,
        "at_once": len(seeds),
        "seeds": seeds,
        "seconds": seconds,
        "seconds_a_run": seconds / len(seeds),
        "first_of_its_way": is_first,
        **{name: [one[name] for one in found] for name in names},
        "dataset": options.dataset,
        "loss": options.loss,
        "epochs": found[0]["last_epoch"],
        "options": options.more,
        "precision": found[0]["precision"],
        "device": found[0]["device"],
    }
    print(f"{way}, {len(seeds)} at once: {seconds:.0f} s", flush=True)
    return row


def waited(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for the processes; returns their exit statuses.

    SIGTERM reaches them too: this process then waits until they have saved themselves.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.wait()


def start(way: Way, seed: int, folder: Path, options: Options) -> subprocess.Popen[bytes]:
    arguments = ["--dataset", options.dataset, "--loss", options.loss, "--seed", str(seed), "--loader", "device"]
    arguments += [] if options.data is None else ["--data", str(options.data), "--validate-on", "test"]
    arguments += [] if options.epochs is None else ["--epochs", str(options.epochs)]
    command = [sys.executable, run.__file__, *arguments, *FLAGS[way], *shlex.split(options.more)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([*command, "--output", str(folder)], stdout=log, stderr=subprocess.STDOUT)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{rows[0]['dataset']}, {rows[0]['loss']}, {rows[0]['epochs']} epochs")
    for name in ("way", "at once", "seconds a run", "images/s in training", "best epoch", "last epoch"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for way, at_once in dict.fromkeys((row["way"], row["at_once"]) for row in rows):
        of = [row for row in rows if (row["way"], row["at_once"]) == (way, at_once)]
        seconds = statistics.median(row["seconds_a_run"] for row in of)
        best, last, rates = (
            [value for row in of for value in row[name]]
            for name in ("balanced_accuracy", "last_epoch_balanced_accuracy", "images_per_second")
        )
        accuracies = (percent(values) for values in (best, last))
        shown.add_row(way, str(at_once), f"{seconds:.0f}", f"{statistics.median(rates):,.0f}", *accuracies)
    return shown


def percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
