"""The paper's tables and figure 3, each by one command: `python train/reproduce.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from rcl_fast.train.arguments import parsing
from rcl_fast.train.arguments.ranges import flag, hints
from rcl_fast.train.command_line import command
from rcl_fast.train.options import Config, ReproduceOptions


@dataclass(frozen=True)
class Command:
    """The command line."""

    table: tyro.conf.Positional[Literal["table1", "table2", "table3", "table4", "table5", "figure3", "compression"]]
    """table1: top-1 of the five losses; table2: their harmonic means; table3: imbalance factors and baselines; table4:
    ImageNet-LT; table5: cluster indices; figure3: t-SNE before and after; compression: the rule's two readings."""
    options: ReproduceOptions


_DESCRIPTION = """Run what is missing of one of the paper's tables, and show it with ours beside it.

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
    """Parses the command line, runs what is missing, shows the table; the exit status tells what became of the runs."""
    with command():
        given = parse(arguments)
        from rcl_fast.train.experiments.job_queue import log_failures
        from rcl_fast.train.experiments.reproduce import reproduce, table_of  # load PyTorch, which --help need not

        sys.exit(log_failures(reproduce(table_of(given.table, given.options), given.options)))


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Returns the parsed command line."""
    return parsing.parse(
        Command,
        arguments,
        prog="train/reproduce.py",
        description=_DESCRIPTION,
        elsewhere={
            **{name: f'--more="{flag(name)} ..." has it, for all runs' for name in hints(Config)},
            "seed": "--seeds N runs the seeds 0 to N - 1 of each row",
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
