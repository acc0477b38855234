"""Kill a real run of two processes at random points, resume it, and compare its end with a run that nothing stopped.

    python tests/faults/kill.py --kills 48 --output bench/results/faults/kill.jsonl

The processes are started and watched by torchrun's own agent, but forked from this one, which has imported everything:
a run then takes seconds. What is compared: every parameter, buffer and momentum, and the history without its times.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import tyro
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rcl_fast.train import run
from rcl_fast.train.loop import engine
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoint_files, checkpoints

PROCESSES = 2
ARGUMENTS = (
    *("--device", "cpu", "--workers", "0", "--batch-size", "96", "--epochs", "3", "--lr", "0.02"),
    *("--checkpoint-minutes", "0"),  # one before every step
)
TIMINGS = {"images_per_second", "waiting_for_data"}


@dataclass
class Options:
    """How often, and where the rows go."""

    kills: int = 48
    """Runs to kill and resume."""
    seed: int = 0
    """Of the points."""
    losses: tuple[str, ...] = ("bcl_rcl", "ce")
    """Taken by chance."""
    loaders: tuple[str, ...] = ("device", "torchvision")
    """Taken by chance."""
    output: Path | None = None
    """File of JSON lines to append a row a kill to."""


@dataclass(frozen=True)
class Point:
    """Where a process dies: the `nth` time that process `rank` comes to `place`, or all after `seconds`."""

    place: str
    nth: int = 0
    rank: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" if self.place == "any time" else f"process {self.rank}, number {self.nth + 1}"


CUT_SHORT = "in a step, and the newest checkpoint then cut short"
# Each place, and how often a run of three epochs of three steps comes there.
PLACES = {
    "in a step": 9,
    "in an evaluation": 3,
    CUT_SHORT: 9,
    "half of a checkpoint written": 15,
    "a checkpoint written, not yet renamed": 30,  # of the file, of the folder
    "last.pt is previous.pt, the new one not yet last.pt": 4,
    "last.pt written, best.pt not yet": 1,
}


def main(options: Options) -> int:
    """The rows, printed and written; 1 where a run ended differently."""
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    references: dict[tuple[str, str], tuple[dict[str, Any], float]] = {}
    same = 0
    for number in range(options.kills):
        case = rng.choice(options.losses), rng.choice(options.loaders)
        with tempfile.TemporaryDirectory() as folder:
            if case not in references:
                references[case] = uninterrupted(Path(folder) / "whole", *case)
            whole, seconds = references[case]
            row = kill_and_resume(Path(folder) / "killed", *case, point(number, rng, seconds), whole)
        same += row["same"]
        print(json.dumps(row), flush=True)
        if options.output is not None:
            write(options.output, row)
    print(f"{same} of {options.kills} killed runs ended as the uninterrupted one did")
    return int(same < options.kills)


def point(number: int, rng: random.Random, seconds: float) -> Point:
    """Every other at any time, the others at the places in turn; the rest by chance."""
    if number % 2 == 0:
        return Point("any time", seconds=rng.uniform(0, seconds))
    place = list(PLACES)[number // 2 % len(PLACES)]
    rank = (
        rng.randrange(PROCESSES) if place in ("in a step", "in an evaluation", CUT_SHORT) else 0
    )  # the main process writes
    return Point(place, nth=rng.randrange(PLACES[place]), rank=rank)


def uninterrupted(folder: Path, loss: str, loader: str) -> tuple[dict[str, Any], float]:
    """The end of a run that nothing stops, and how long it took."""
    began = time.monotonic()
    if launch(["--output", str(folder), "--loss", loss, "--loader", loader, *ARGUMENTS]) != 0:
        raise SystemExit(f"the run to compare with failed; what it said is above ({folder})")
    return end_of(folder), time.monotonic() - began


def kill_and_resume(folder: Path, loss: str, loader: str, at: Point, whole: dict[str, Any]) -> dict[str, Any]:
    """The row of one kill."""
    anew = ["--output", str(folder), "--loss", loss, "--loader", loader, *ARGUMENTS]
    status = launch(anew, at)
    if at.place == CUT_SHORT and checkpoint_files.exist(folder):
        newest = checkpoints.newest(folder).path
        os.truncate(newest, newest.stat().st_size // 3)
    found = checkpoints.newest(folder) if checkpoint_files.exist(folder) else None
    row = {
        "loss": loss,
        "loader": loader,
        "killed": at.place,
        "where": str(at),
        "came_to_it": status != 0,
        "went_on_from": None if found is None else found.path.name,
        "epoch": None if found is None else found.state["loader"]["epoch"],
        "step": None if found is None else found.state["loader"]["step"],
        "damaged": [] if found is None else [path.name for path in found.damaged],
    }
    resumed = launch(anew if found is None else ["--resume", str(folder)])
    ended = end_of(folder) if resumed == 0 else None
    return {**row, "same": ended == whole, "sha256": "none" if ended is None else ended["sha256"]}


def launch(arguments: list[str], at: Point | None = None) -> int:
    """A run of PROCESSES processes; its exit status, negative or 1 where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=_agent, args=(arguments, at))
    process.start()
    assert process.pid is not None
    if at is not None and at.place == "any time":
        process.join(at.seconds)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's agent and both processes at once
    process.join()
    return process.exitcode or 0


def _agent(arguments: list[str], at: Point | None) -> None:
    """torchrun, without its command line."""
    os.setsid()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=PROCESSES,
        run_id=f"faults-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.05,
    )
    try:
        elastic_launch(config, _process)(arguments, at)
    except Exception as error:
        if at is None:
            print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _process(arguments: list[str], at: Point | None) -> None:
    """One of the processes, rigged to die at that point."""
    results.write_report = lambda *_: None  # type: ignore[assignment]  # slow, and after everything that counts
    if at is not None and int(os.environ["RANK"]) == at.rank:
        _rig(at)
    run.main(arguments)


def _rig(at: Point) -> None:
    """Have this process kill itself at the point."""
    visits = itertools.count()

    def visit() -> None:
        if next(visits) == at.nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(state: dict[str, Any], file: BinaryIO) -> None:
        whole = io.BytesIO()
        torch.save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        visit()
        file.write(whole.getvalue()[whole.tell() // 2 :])

    if at.place in ("in a step", CUT_SHORT):
        _visited_before(engine, "train_step", visit)
    elif at.place == "in an evaluation":
        _visited_before(engine, "evaluate", visit)
    elif at.place == "half of a checkpoint written":
        checkpoints._write = half
    elif at.place == "a checkpoint written, not yet renamed":
        _visited_before(os, "fsync", visit)
    elif at.place == "last.pt is previous.pt, the new one not yet last.pt":
        _visited_before(os, "replace", visit, lambda _, target: target.name == "last.pt")
    elif at.place == "last.pt written, best.pt not yet":
        _visited_before(checkpoints, "save", visit, lambda path, *_: path.name == "best.pt")


def _visited_before(
    module: Any, name: str, visit: Callable[[], None], when: Callable[..., bool] = lambda *_: True
) -> None:
    original = getattr(module, name)

    def function(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            visit()
        return original(*arguments, **options)

    setattr(module, name, function)


def end_of(folder: Path) -> dict[str, Any]:
    """What must not depend on where a run was stopped: a hash of what was learnt, the history, the best epoch."""
    last, best = checkpoints.load(folder / checkpoints.LAST), checkpoints.load(folder / checkpoints.BEST)
    digest = hashlib.sha256()
    for state in (last, best):
        for tensors in (state["model"], *state["optimizer"]["state"].values()):
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    history = [{name: row[name] for name in row.keys() - TIMINGS} for row in last["history"]]
    kept = ("epoch", "best_epoch", "best_accuracy", "notes")
    return {"sha256": digest.hexdigest()[:16], "history": history, **{name: last[name] for name in kept}}


def write(file: Path, row: dict[str, Any]) -> None:
    """Append a row, with what it was measured on."""
    sys.path.append(str(Path(__file__).parents[2]))
    from bench.rows import append

    append(file, [{**row, "processes": PROCESSES}])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
