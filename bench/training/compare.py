"""Losses or loaders against each other over several seeds, each with its recipe's values: runs, rows, and a table.

    python -m bench.training.compare                          digits_lt: bcl_rcl against cross-entropy, 3 seeds
    python -m bench.training.compare --losses bcl scl         any others
    python -m bench.training.compare --losses bcl_rcl --loaders device dali torchvision --more="--lr 0.05"

A table of one's own, for what runs and shows those of the paper (train/reproduce.py). Each run is `train/run.py` with
its recipe, whose alpha and tau depend on the loss: not everything else is held equal.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from rcl_fast.train.command_line import command
from rcl_fast.train.experiments.job_queue import log_failures
from rcl_fast.train.experiments.reproduce import reproduce
from rcl_fast.train.experiments.tables import Column, Row, Table
from rcl_fast.train.options import ReproduceOptions

SHOWN = ("balanced_accuracy", "harmonic_mean", "many", "medium", "few")


@dataclass
class Options:
    """What to compare."""

    dataset: str = "digits_lt"
    """Data set and recipe."""
    data: Path | None = None
    """Folder of the data set, where it needs one."""
    losses: tuple[str, ...] = ("ce", "logit_adjusted", "bcl_rcl")
    """Losses, in the order of the table's rows."""
    loaders: tuple[str, ...] = ("auto",)
    """Loaders; each loss runs with each of them."""
    more: str = ""
    """Any other options of train/run.py, the same for all runs."""
    seeds: int = 3
    """Seeds 0, 1, ... of each."""
    epochs: int | None = None
    """Epochs; None: the recipe's."""
    folder: Path = Path("runs/compare")
    """Where the runs are kept; those that are finished are not run again."""
    output: Path | None = None
    """Folder for the table (compare.md, .json) and a row a run (compare.jsonl); by default tables/ in --folder."""


def main(options: Options) -> int:
    how = ReproduceOptions(
        data=options.data, seeds=options.seeds, more=options.more, folder=options.folder, output=options.output
    )
    with command():
        return log_failures(reproduce(table(options), how))


def table(options: Options) -> Table:
    """Returns a table with a row for each loss with each loader."""
    where = {"dataset": options.dataset} | ({} if options.epochs is None else {"epochs": options.epochs})
    several = len(options.loaders) > 1
    rows = (
        Row(f"{loss}, {loader}" if several else loss, {"loss": loss, "loader": loader})
        for loss, loader in itertools.product(options.losses, options.loaders)
    )
    return Table(
        "compare", f"{options.dataset}: losses compared", tuple(Column(where, name) for name in SHOWN), tuple(rows)
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
