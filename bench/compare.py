"""Losses or loaders against each other over several seeds, each with its recipe's values: runs, rows, and a table.

    python bench/compare.py                          digits_lt: bcl_rcl against cross-entropy, 3 seeds
    python bench/compare.py --losses bcl scl         any others
    python bench/compare.py --losses bcl_rcl --loaders device dali torchvision --more="--lr 0.05"

Each run is `train/run.py` with its recipe, whose alpha and tau depend on the loss: not everything else is held equal.
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import tyro

from rcl_fast.train import run
from rcl_fast.train.config import parse

SHOWN = {
    "balanced_accuracy": "balanced accuracy",
    "last_epoch_balanced_accuracy": "the same, last epoch",
    "harmonic_mean": "harmonic mean",
    "many": "many",
    "medium": "medium",
    "few": "few",
}


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
    output: Path | None = None
    """File of JSON lines to append the rows to."""


def main(options: Options) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for loss, loader in itertools.product(options.losses, options.loaders):
                rows.append(train(options, loss, loader, seed, Path(folder) / f"{loss}-{loader}-{seed}"))
                if options.output is not None:
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def train(options: Options, loss: str, loader: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run; its row."""
    arguments = ["--dataset", options.dataset, "--loss", loss, "--seed", str(seed), "--output", str(folder)]
    arguments += ["--loader", loader, *shlex.split(options.more)]
    if options.data is not None:
        arguments += ["--data", str(options.data)]
    if options.epochs is not None:
        arguments += ["--epochs", str(options.epochs)]
    run.run(parse(arguments))
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    kept = (*SHOWN, "worst_class", "best_epoch", "last_epoch", "selected_on", "parameters", "loader")
    return {
        "dataset": options.dataset,
        "loss": loss,
        "seed": seed,
        **{k: results[k] for k in (*kept, "images_per_second", "waiting_for_data")},
        "options": options.more,
        **machine.describe(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, in percent, as Markdown."""
    lines = ["| loss | loader | " + " | ".join(SHOWN.values()) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    for loss, loader in dict.fromkeys((row["loss"], row["loader"]) for row in rows):
        of_pair = [row for row in rows if (row["loss"], row["loader"]) == (loss, loader)]
        cells = [spread([row[name] for row in of_pair]) for name in SHOWN]
        lines.append(f"| `{loss}` | {loader} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
