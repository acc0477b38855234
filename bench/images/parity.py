"""What a trained network makes of each loader's views of the training images: a fine test that they are alike.

    python -m bench.images.parity --run runs/NAME [--data DIR] [--output FILE]

One pass over the training images with each loader, without training: the network's cross-entropy and accuracy on every
view, as it classifies them in evaluation. Between two loaders the mean cross-entropies differ by their standard errors
if the random parameters of their views are sampled alike; a training run's accuracy, with its seeds, shows much larger
differences only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from bench.rows import append
from rcl_fast.train.config import saved_config
from rcl_fast.train.loaders import build
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.runtime.hardware import choose_runtime


@dataclass
class Options:
    """Which network, and which loaders."""

    run: Path
    """Folder of a run whose last checkpoint is taken, and whose recipe the views are of."""
    data: Path | None = None
    """Folder of the data set, where it has moved."""
    loaders: tuple[str, ...] = ("device", "dali", "torchvision")
    """Loaders to compare; differences are from the last."""
    epoch: int = 0
    """Which epoch's views."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""


def main(options: Options) -> None:
    config = saved_config(options.run)
    data = dataclasses.replace(config.data, data=options.data or config.data.data)
    config = dataclasses.replace(config, data=data)
    splits = build.load(config)
    training = start_training(config, splits, choose_runtime(config.run))
    training.model.load_state_dict(checkpoints.last_epoch(options.run).state["model"])
    training.model.eval()
    rows = [row for name in options.loaders for row in seen(training, splits, name, options.epoch)]
    for line in table(rows, options.loaders[-1]):
        print(line)
    append(options.output, rows)


@torch.no_grad()
def seen(training: Training, splits: Any, loader: str, epoch: int) -> list[dict[str, Any]]:
    """Returns a row for each view: cross-entropy with its standard error, and accuracy."""
    config = training.config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, loader=loader))
    losses: dict[str, list[torch.Tensor]] = {}
    right: dict[str, list[torch.Tensor]] = {}
    for batch in build.training_loader(config, splits, training.runtime).epoch(epoch):
        labels = training.runtime.labels(batch.labels)
        for number, images in enumerate(batch.views, start=1):
            view = f"x{number}"
            logits = training.model.classifier(training.model.backbone(training.runtime.images(images)))
            losses.setdefault(view, []).append(F.cross_entropy(logits.float(), labels, reduction="none").cpu())
            right.setdefault(view, []).append((logits.argmax(1) == labels).float().cpu())
    rows = []
    for view, parts in losses.items():
        values = torch.cat(parts).double()
        rows.append(
            {
                "dataset": config.data.dataset,
                "loader": loader,
                "view": view,
                "kind": getattr(config.views, view),
                "images": len(values),
                "cross_entropy": values.mean().item(),
                "standard_error": (values.std() / len(values) ** 0.5).item(),
                "accuracy": torch.cat(right[view]).mean().item(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], reference: str) -> list[str]:
    """Returns a Markdown table; differences from the reference loader are in units of their standard error."""
    lines = ["| view | loader | cross-entropy | difference / its standard error | accuracy |", "|---" * 5 + "|"]
    for row in sorted(rows, key=lambda row: row["view"]):
        other = next(r for r in rows if r["loader"] == reference and r["view"] == row["view"])
        error = (row["standard_error"] ** 2 + other["standard_error"] ** 2) ** 0.5
        distance = "–" if row is other else f"{(row['cross_entropy'] - other['cross_entropy']) / error:+.1f}"
        lines.append(
            f"| {row['view']} ({row['kind']}) | `{row['loader']}` | {row['cross_entropy']:.3f} ± "
            f"{row['standard_error']:.3f} | {distance} | {row['accuracy']:.1%} |"
        )
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
