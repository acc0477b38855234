"""What a table needs, what of it is missing, and the queue that trains it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from rcl_fast.train.experiments import job_queue, runs
from rcl_fast.train.experiments.job_queue import Failure, Job
from rcl_fast.train.experiments.runs import Run
from rcl_fast.train.experiments.setting import Setting
from rcl_fast.train.experiments.tables import Table
from rcl_fast.train.options import Dataset


@dataclass(frozen=True)
class Options:
    """On what, how much of it, and where the results go."""

    data: Path | None = None
    """Folder of the data set, or of several in folders of their names (DIR/cifar10_lt, DIR/cifar100_lt)."""
    seeds: int = 3
    """Seeds 0, 1, ... of each row."""
    only: tuple[str, ...] = ()
    """Rows to run and show, by their labels, like BCL+RCL; empty: all."""
    folder: Path = Path("runs/reproduction")
    """Where the runs are kept, each in a folder named by what it computes: tables share them."""
    output: Path | None = None
    """Folder of the table as Markdown and JSON, and of its runs' rows; by default tables/ in --folder."""
    rows: tuple[Path, ...] = ()
    """Files of rows that an earlier call wrote (TABLE.jsonl): those runs are not run again."""
    run: bool = True
    """--no-run: show what is finished, and train nothing."""
    dry_run: bool = False
    """Print the command of every run that is missing, and do nothing."""

    dataset: Dataset | None = None
    """One of the table's data sets alone; or another in place of them, and the table says so."""
    epochs: int | None = None
    """Not the paper's epochs, to see it work; the table says so."""
    validate_on: Literal["validation", "test"] | None = None
    """Where epochs are selected; by default on CIFAR the test set, as the literature does."""
    more: str = ""
    """Any other options of train/run.py, for all runs, like --more="--batch-size 128"; the table says so. Those that
    change how runs are computed and not what, like --more="--cuda-graph --compile", leave the setting the paper's."""

    devices: tuple[str, ...] | None = None
    """GPUs, as CUDA_VISIBLE_DEVICES names them; by default all, else the CPU."""
    jobs_per_device: int = 1
    """Runs on a device at once: a CIFAR run does not fill a large GPU."""
    gpus_per_run: int = 1
    """GPUs that train one run together, for ImageNet-LT."""
    part: str = "1/1"
    """I/N: only every N-th of the runs, from the I-th on, and no table: for an array of jobs."""


class Entry(NamedTuple):
    """One figure of a table: a training of it, or a second stage on that."""

    run: Run
    second_stage: str | None

    @property
    def id(self) -> tuple[str, str | None]:
        return self.run.key, self.second_stage

    @property
    def label(self) -> str:
        return self.run.label + (f", {self.second_stage}" if self.second_stage else "")


Plan = list[list[list[Entry]]]
"""Entries by row, column and seed."""
Rows = dict[tuple[str, str | None], dict[str, Any]]


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def plan(table: Table, setting: Setting, options: Options) -> Plan:
    """What each cell needs."""
    where = options.folder, options.data
    return [
        [
            [Entry(run, row.second_stage) for run in runs.runs_of(row, column, setting, range(options.seeds), *where)]
            for column in table.columns
        ]
        for row in table.rows
    ]


def unique(entries: Plan) -> Iterator[Entry]:
    """Each once, in the table's order, one seed after the other: the first seed of all rows comes first."""
    found = {entry.id: entry for row in entries for cell in row for entry in cell}
    yield from sorted(found.values(), key=lambda entry: entry.run.config.run.seed)


def read_rows(files: Sequence[Path]) -> Rows:
    """By key and second stage; raises SystemExit."""
    found: Rows = {}
    for file in files:
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                found[row["key"], row["second_stage"]] = row
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"--rows {file}: no file of rows ({error!r})") from error
    return found


def missing_runs(entries: Plan, known: Rows) -> list[Run]:
    """Trainings to do or to finish; a known second stage needs none."""
    found = {entry.run.key: entry.run for entry in unique(entries) if entry.id not in known}
    return [run for run in found.values() if (run.key, None) not in known and runs.state(run) != "finished"]


def missing_stages(entries: Plan, known: Rows) -> list[Entry]:
    return [
        entry
        for entry in unique(entries)
        if entry.second_stage is not None
        and entry.id not in known
        and not (runs.second_stage_folder(entry.run, entry.second_stage) / "metrics.json").is_file()
    ]


def dry(entries: Plan, known: Rows, processes: int) -> list[str]:
    """Every command that there is to run, in order."""
    trainings = [shlex.join(runs.command(run, processes)) for run in missing_runs(entries, known)]
    stages = [
        shlex.join(runs.second_stage_command(entry.run, entry.second_stage))
        for entry in missing_stages(entries, known)
        if entry.second_stage is not None
    ]
    return trainings + stages


def run_missing(entries: Plan, known: Rows, options: Options, console: Console) -> list[Failure]:
    """Train, then second stages, then what is measured on checkpoints. Raises workers.Stopped."""
    mine = part_of(list(dict.fromkeys(entry.run.key for entry in unique(entries))), options.part)
    wanted, missing = len(mine), [run for run in missing_runs(entries, known) if run.key in mine]
    half_done = sum(runs.state(run) == "half done" for run in missing)
    say(
        console,
        f"{wanted} runs: {wanted - len(missing)} done, {half_done} half done, {len(missing) - half_done} to start",
    )
    needing = [
        run.config.data.dataset for run in missing if run.data is None and run.config.data.dataset != "digits_lt"
    ]
    if needing:
        raise SystemExit(f"{needing[0]} is to be trained on: say where it is with --data DIR")
    places = job_queue.slots(options.devices, options.jobs_per_device, options.gpus_per_run)
    failures = job_queue.run_all([_training(run, options.gpus_per_run) for run in missing], places, console)
    stages = [entry for entry in missing_stages(entries, known) if entry.run.key in mine]
    trained = [entry for entry in stages if runs.state(entry.run) == "finished"]
    failures += [
        Failure(_stage(entry), "of its training only the row is here (--rows), not the folder with the checkpoint")
        for entry in stages
        if entry not in trained and (entry.run.key, None) in known
    ]
    return failures + job_queue.run_all([_stage(entry) for entry in trained], places, console)


def part_of(keys: list[str], part: str) -> list[str]:
    """Of all the runs, finished or not: the jobs of an array start at different times, and must agree."""
    index, count = map(int, part.split("/"))
    return keys[index - 1 :: count]


def _training(run: Run, processes: int) -> Job:
    return Job(run.label, runs.command(run, processes), run.folder, run.config.optimization.epochs)


def _stage(entry: Entry) -> Job:
    assert entry.second_stage is not None
    folder = runs.second_stage_folder(entry.run, entry.second_stage)
    return Job(entry.label, runs.second_stage_command(entry.run, entry.second_stage), folder, epochs=0)
