"""What a trained network reached, once for everything that tests one: metrics.json, per_class.csv, report, table."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rcl_fast import metrics
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.loop.evaluation import Evaluation
from rcl_fast.train.loop.training import Training
from rcl_fast.train.options import Config
from rcl_fast.train.report.page import Report, write_report
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.files import write_text

METRICS = "metrics.json"
PER_CLASS = "per_class.csv"
REPORT = "report.html"


def figures(
    settings: Config, splits: Splits, training: Training, best: Evaluation, last: Evaluation, interrupted: bool
) -> dict[str, Any]:
    """The content of metrics.json: `best` and `last` are the test set's evaluations of those epochs."""
    counts = training.group_counts
    of_last = metrics.summary(last.confusion, counts)
    return {
        **metrics.summary(best.confusion, counts, best.reliability),
        "per_class_accuracy": _plain(metrics.per_class_accuracy(best.confusion)),
        "reliability": _reliability(best.reliability),
        "best_epoch": training.best_epoch or None,
        "last_epoch": training.epoch,
        "last_epoch_balanced_accuracy": of_last["balanced_accuracy"],
        "last_epoch_harmonic_mean": of_last["harmonic_mean"],
        "selected_on": splits.selected_on,
        "parameters": parameters(training.model.backbone, training.model.classifier),
        "parameters_with_heads": parameters(training.model),
        "images_per_second": _median([row["images_per_second"] for row in training.history]),
        "loader": settings.data.loader,
        "waiting_for_data": _median([row["waiting_for_data"] for row in training.history]),
        "interrupted": interrupted,
        "device": training.machine.device.type,
        "processes": distributed.world(),
        "precision": training.machine.precision,
        "seed": settings.run.seed,
        "loss": settings.loss.loss,
    }


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def write(
    settings: Config, splits: Splits, training: Training, folder: Path, found: dict[str, Any], best: Evaluation
) -> None:
    """metrics.json (`found`, of `figures`), per_class.csv and report.html. Raises OSError."""
    counts = training.group_counts
    write_text(folder / METRICS, json.dumps(found, indent=2) + "\n")
    write_per_class(folder / PER_CLASS, splits.class_names, counts, best.confusion)
    write_report(
        folder / REPORT,
        Report(
            title=f"{settings.data.dataset} · {settings.loss.loss} · {settings.model.arch}",
            config=settings.to_dict(),
            metrics=found,
            history=training.history,
            class_names=splits.class_names,
            class_counts=counts.tolist(),
            confusion=best.confusion.numpy(),
            embeddings=best.features.numpy(),
            embedding_labels=best.labels.numpy(),
            notes=training.notes,
            reliability=best.reliability.numpy(),
        ),
    )


def write_per_class(path: Path, names: list[str], counts: Tensor, confusion: Tensor) -> None:
    """A row a class: its training images [C], test images, accuracy (its recall) and precision; unknown ones empty."""
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["class", "training_images", "test_images", "accuracy", "precision"])
    accuracy, precision = (_plain(f(confusion)) for f in (metrics.per_class_accuracy, metrics.per_class_precision))
    table.writerows(zip(names, counts.tolist(), confusion.sum(dim=1).tolist(), accuracy, precision, strict=True))
    # A class is named after its folder, and a folder's name need not be valid Unicode.
    write_text(path, rows.getvalue().encode(errors="replace").decode())


def show(console: Console, found: dict[str, Any]) -> None:
    """Print the table of the test set's figures."""
    which = f"epoch {found['best_epoch']}, selected on {found['selected_on']}"
    show_beside(console, f"test set, {which if found['best_epoch'] else 'untrained'}", {"value": found})


def show_beside(console: Console, title: str, columns: dict[str, dict[str, Any]]) -> None:
    """The same of several, a column each, under its name; the last one's epochs are named."""
    table = Table("", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    last = list(columns.values())[-1]["last_epoch"]
    for label, key in {**_SHOWN, f"balanced accuracy, last epoch ({last})": "last_epoch_balanced_accuracy"}.items():
        values = [found.get(key) for found in columns.values()]
        table.add_row(label, *("–" if value is None else f"{value:.1%}" for value in values))
    console.print(table)


_SHOWN = {
    "balanced accuracy": "balanced_accuracy",
    "harmonic mean": "harmonic_mean",
    "geometric mean": "geometric_mean",
    "many (> 100 images)": "many",
    "medium (20 to 100)": "medium",
    "few (< 20)": "few",
    "worst class": "worst_class",
    "calibration error (ECE)": "expected_calibration_error",
}


def _reliability(bins: Tensor) -> dict[str, list[Any]]:
    """A number for each bin; mean confidence and accuracy are None where it has no image."""
    images, confidence, right = bins.unbind(dim=1)
    return {
        "images": images.long().tolist(),
        "confidence": _plain(confidence / images),
        "accuracy": _plain(right / images),
    }


def _plain(values: Tensor) -> list[float | None]:
    """NaN is no JSON."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
