"""The paper's tables and figure 3, each by one command: `python train/reproduce.py --help`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.console import Console

from rcl_fast.train.config import Dataset
from rcl_fast.train.experiments import clusters, pictures, render, results, runs, workers
from rcl_fast.train.experiments.render import Filled
from rcl_fast.train.experiments.runs import Run, Setting
from rcl_fast.train.experiments.tables import TABLES, Table
from rcl_fast.train.experiments.workers import Failure, Job
from rcl_fast.train.logs import write_text

Name = Literal["table1", "table2", "table3", "table4", "table5", "figure3", "compression"]


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


@dataclass(frozen=True)
class Command:
    """The command line."""

    table: tyro.conf.Positional[Name]
    """table1: top-1 of the five losses; table2: their harmonic means; table3: imbalance factors and baselines; table4:
    ImageNet-LT; table5: cluster indices; figure3: t-SNE before and after; compression: the rule's two readings."""
    options: Options


DESCRIPTION = """Run what is missing of one of the paper's tables, and show it with ours beside it.

Examples:
  train/reproduce.py table1 --data DIR                       all runs of table 1, 3 seeds, on every GPU of the machine
  train/reproduce.py table2 --data DIR                       the same runs: nothing is trained again
  train/reproduce.py table3 --data DIR --jobs-per-device 4   four CIFAR runs at once on each GPU
  train/reproduce.py table4 --data DIR --gpus-per-run 4      ImageNet-LT, each run on four GPUs
  train/reproduce.py table3 --data DIR --part $SLURM_ARRAY_TASK_ID/8    one job of an array of eight; then without
  train/reproduce.py table1 --dataset digits_lt --seeds 1 --epochs 2    everything once, in minutes on a CPU
  train/reproduce.py table1 --data DIR --dry-run             the commands, for a scheduler of your own

Ctrl-C and SIGTERM stop it; the runs under way save themselves, and the same command goes on. Exit status: 0 where the
table is complete, 1 where a run failed, 75 after SIGTERM and 130 after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse it, and do it."""
    command = parse(arguments)
    sys.exit(reproduce(table_of(command.table, command.options), command.options, Console()))


def parse(arguments: Sequence[str] | None = None) -> Command:
    return tyro.cli(
        Command,
        args=arguments,
        prog="train/reproduce.py",
        description=DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def table_of(name: Name, options: Options) -> Table:
    """The table of that name, on the data set asked for; raises SystemExit for a row it does not have."""
    table = runs.adapt(TABLES[name], options.dataset)
    labels = list(dict.fromkeys(row.label for row in table.rows))
    unknown = [label for label in options.only if label not in labels]
    if unknown:
        raise SystemExit(f"--only {unknown[0]!r}: {table.name} has no such row; it has {', '.join(map(repr, labels))}")
    return table._replace(rows=tuple(row for row in table.rows if not options.only or row.label in options.only))


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


def reproduce(table: Table, options: Options, console: Console) -> int:
    """Run what is missing, show the table and write it; the exit status."""
    _check(options)
    setting = Setting(options.dataset, options.epochs, options.validate_on, tuple(shlex.split(options.more)))
    entries = plan(table, setting, options)
    known = read_rows(options.rows)
    if options.dry_run:
        for line in dry(entries, known, options.gpus_per_run):
            print(line)
        return 0
    if table.name == "figure3":
        pictures.check_drawable()
    failures: list[Failure] = []
    if options.run:
        try:
            failures = run_missing(entries, known, options, console)
        except workers.Stopped as stopped:
            say(console, f"{stopped}; the runs under way have saved themselves: the same command goes on")
            return os.EX_TEMPFAIL if stopped.number != signal.SIGINT else 130
    if options.part != "1/1":
        say(console, f"part {options.part} is done; the command without --part shows the table")
    else:
        show(table, entries, known, setting, options, console)
    for failure in failures:
        say(console, f"no result: {failure.job.label}: {failure.why}")
    return 1 if failures else 0


def _check(options: Options) -> None:
    index, _, count = options.part.partition("/")
    whole = index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
    problems = [
        message
        for wrong, message in [
            (options.seeds < 1, f"--seeds must be at least 1, got {options.seeds}"),
            (options.jobs_per_device < 1, f"--jobs-per-device must be at least 1, got {options.jobs_per_device}"),
            (options.gpus_per_run < 1, f"--gpus-per-run must be at least 1, got {options.gpus_per_run}"),
            (not whole, f"--part is I/N with 1 <= I <= N, like 2/8; got {options.part}"),
        ]
        if wrong
    ]
    if problems:
        raise SystemExit("\n".join(problems))


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
    if not runs.second_stages_are_built():
        return []
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
    places = workers.slots(options.devices, options.jobs_per_device, options.gpus_per_run)
    failures = workers.run_all([_training(run, options.gpus_per_run) for run in missing], places, console)
    stages = [entry for entry in missing_stages(entries, known) if entry.run.key in mine]
    trained = [entry for entry in stages if runs.state(entry.run) == "finished"]
    failures += [
        Failure(_stage(entry), "of its training only the row is here (--rows), not the folder with the checkpoint")
        for entry in stages
        if entry not in trained and (entry.run.key, None) in known
    ]
    return failures + workers.run_all([_stage(entry) for entry in trained], places, console)


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


def show(table: Table, entries: Plan, known: Rows, setting: Setting, options: Options, console: Console) -> None:
    """Gather, print, and write TABLE.md, TABLE.json and TABLE.jsonl, the rows of the runs."""
    if any(row.features for row in table.rows):
        _measure_clusters(entries, known, console)
    found = {entry.id: row for entry in unique(entries) if (row := _row(entry, known)) is not None}
    filled = fill(table, entries, found, setting, options.seeds)
    say(console, render.title(filled))
    console.print(render.for_terminal(filled))
    say(console, "\n".join(render.notes(filled)))
    folder = options.output or options.folder / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name(table, setting, options.only)
    write_text(file.with_name(file.name + ".md"), render.as_markdown(filled))
    write_text(file.with_name(file.name + ".json"), json.dumps(render.as_json(filled), indent=2) + "\n")
    rows = {id: {"not_the_papers_setting": filled.setting, **row} for id, row in found.items()}
    kept = other_seeds(file.with_name(file.name + ".jsonl"), table, setting, options)
    lines = [json.dumps(row) + "\n" for row in {**kept, **rows}.values()]
    write_text(file.with_name(file.name + ".jsonl"), "".join(lines))
    say(console, f"written: {file}.md, .json and .jsonl")
    if table.name == "figure3":
        _draw(table, entries, render.title(filled), file, console)


def file_name(table: Table, setting: Setting, only: Sequence[str]) -> str:
    """What is not the paper's setting has a name of its own, and so has a part of the table."""
    changed = {"epochs": f"{setting.epochs}epochs", "validate_on": f"on_{setting.validate_on}", "more": "more"}
    parts = [text for name, text in changed.items() if setting.changes(table, name)]
    return "-".join([table.name, *([setting.dataset] if setting.dataset else []), *parts, *(["only"] if only else [])])


def other_seeds(file: Path, table: Table, setting: Setting, options: Options) -> Rows:
    """The rows in `file` of the table's runs, with as many seeds as are there: a call with fewer is to lose none."""
    before = read_rows([file] if file.is_file() else [])
    seeds = 1 + max((row["seed"] for row in before.values()), default=-1)
    wanted = {entry.id for entry in unique(plan(table, setting, dataclasses.replace(options, seeds=seeds)))}
    return {id: row for id, row in before.items() if id in wanted}


def _row(entry: Entry, known: Rows) -> dict[str, Any] | None:
    return known.get(entry.id) or runs.row_of(entry.run, entry.second_stage)


def _measure_clusters(entries: Plan, known: Rows, console: Console) -> None:
    for entry in unique(entries):
        measured = (entry.run.folder / runs.CLUSTERS).is_file()
        if entry.id not in known and not measured and runs.state(entry.run) == "finished":
            say(console, f"cluster indices: {entry.label}")
            clusters.measure(entry.run.folder, entry.run.data)


def fill(table: Table, entries: Plan, found: Rows, setting: Setting, seeds: int) -> Filled:
    """The table's cells from the rows of its finished runs."""
    words = setting.words(TABLES.get(table.name, table))
    by_row = [
        [
            results.cell(row, column, place, [found[entry.id] for entry in cell if entry.id in found], not words)
            for place, (column, cell) in enumerate(zip(table.columns, of_row, strict=True))
        ]
        for row, of_row in zip(table.rows, entries, strict=True)
    ]
    selected_on = list(dict.fromkeys(row["selected_on"] for row in found.values() if row["selected_on"]))
    without = [_without(row.options is None, row.without_run, row.second_stage) for row in table.rows]
    return Filled(table, by_row, without, words, seeds, selected_on)


def _without(no_run: bool, why: str, second_stage: str | None) -> str:
    if no_run:
        return why
    return "not built" if second_stage and not runs.second_stages_are_built() else "not run"


def _draw(table: Table, entries: Plan, title: str, file: Path, console: Console) -> None:
    """The first seed of each row, side by side; points that are in the file already are drawn as they are."""
    runs_drawn = {row.label: of_row[0][0].run for row, of_row in zip(table.rows, entries, strict=True) if of_row[0]}
    known = pictures.read_points(file)
    panels = {}
    for label, run in runs_drawn.items():
        points = known.get(label, {})
        if points.get("run") != run.key:
            if runs.state(run) != "finished":
                say(console, f"no picture: it needs the checkpoint of {run.label}")
                return
            points = {"run": run.key, "seed": run.config.run.seed, **pictures.points_of(run.folder, run.data)}
        panels[label] = points
    for written in pictures.write(panels, title, file):
        say(console, f"written: {written}")


if __name__ == "__main__":
    main(sys.argv[1:])
