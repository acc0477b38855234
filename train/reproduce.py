"""The paper's tables and figure 3, each by one command: `python train/reproduce.py --help`."""

from __future__ import annotations

import os

if __name__ == "__main__":  # read when PyTorch loads: threads that wait for work then let others run
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro
from rich.console import Console

from rcl_fast.train.experiments import job_queue, pictures
from rcl_fast.train.experiments.job_queue import Failure
from rcl_fast.train.experiments.plan import Options, dry, plan, read_rows, run_missing, say
from rcl_fast.train.experiments.setting import Setting, adapt
from rcl_fast.train.experiments.show import show
from rcl_fast.train.experiments.tables import TABLES, Table

Name = Literal["table1", "table2", "table3", "table4", "table5", "figure3", "compression"]


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
    table = adapt(TABLES[name], options.dataset)
    labels = list(dict.fromkeys(row.label for row in table.rows))
    unknown = [label for label in options.only if label not in labels]
    if unknown:
        raise SystemExit(f"--only {unknown[0]!r}: {table.name} has no such row; it has {', '.join(map(repr, labels))}")
    return table._replace(rows=tuple(row for row in table.rows if not options.only or row.label in options.only))


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
        except job_queue.Stopped as stopped:
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


if __name__ == "__main__":
    main(sys.argv[1:])
