"""The results of a trained network, of a run or a second stage: metrics.json, per_class.csv, report, table."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from rcl_fast import metrics
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.loop.evaluation import Evaluation
from rcl_fast.train.network.models import LongTailedClassifier
from rcl_fast.train.options import Config
from rcl_fast.train.report.page import Report, write_report
from rcl_fast.train.rundir.result_files import METRICS, PER_CLASS, REPORT
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.console import print_table
from rcl_fast.train.runtime.files import write_text
from rcl_fast.train.runtime.hardware import Runtime


class Outcome(NamedTuple):
    """A trained network, of a run or a second stage, with a record of its training."""

    config: Config
    splits: Splits
    runtime: Runtime
    model: LongTailedClassifier
    best_epoch: int  # from 1; 0: none
    last_epoch: int
    history: list[dict[str, Any]]  # a row of figures for each epoch
    notes: list[str]  # sentences for the report

    @property
    def group_counts(self) -> Tensor:
        """Returns the training images of each class, int64 [C], with those held out; they define many, medium, few."""
        return torch.as_tensor(self.splits.published_counts)


def figures(outcome: Outcome, best: Evaluation, last: Evaluation, interrupted: bool) -> dict[str, Any]:
    """Returns the content of metrics.json; `best` and `last` are the test set's evaluations of those epochs."""
    counts, history, model = outcome.group_counts, outcome.history, outcome.model
    of_last = metrics.summary(last.confusion, counts)
    return {
        **metrics.summary(best.confusion, counts, best.reliability),
        "per_class_accuracy": _plain(metrics.per_class_accuracy(best.confusion)),
        "reliability": _reliability(best.reliability),
        "best_epoch": outcome.best_epoch or None,
        "last_epoch": outcome.last_epoch,
        "last_epoch_balanced_accuracy": of_last["balanced_accuracy"],
        "last_epoch_harmonic_mean": of_last["harmonic_mean"],
        "selected_on": outcome.splits.selected_on,
        "parameters": parameters(model.backbone, model.classifier),
        "parameters_with_heads": parameters(model),
        "images_per_second": _median([row["images_per_second"] for row in history]),
        "loader": outcome.config.data.loader,
        "waiting_for_data": _median([row["waiting_for_data"] for row in history]),
        "interrupted": interrupted,
        "device": outcome.runtime.device.type,
        "processes": distributed.world_size(),
        "precision": outcome.runtime.precision,
        "seed": outcome.config.run.seed,
        "loss": outcome.config.loss.loss,
    }


def parameters(*modules: nn.Module) -> int:
    """Returns how many parameters the modules have."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def write(outcome: Outcome, folder: Path, content: dict[str, Any], best: Evaluation) -> None:
    """Writes metrics.json (`content`, which `figures` returned), per_class.csv and report.html. Raises OSError."""
    config, class_names, counts = outcome.config, outcome.splits.class_names, outcome.group_counts
    write_text(folder / METRICS, json.dumps(content, indent=2) + "\n")
    write_per_class(folder / PER_CLASS, class_names, counts, best.confusion)
    write_report(
        folder / REPORT,
        Report(
            title=f"{config.data.dataset} · {config.loss.loss} · {config.model.arch}",
            config=config.to_dict(),
            metrics=content,
            history=outcome.history,
            class_names=class_names,
            class_counts=counts.tolist(),
            confusion=best.confusion.numpy(),
            embeddings=best.features.numpy(),
            embedding_labels=best.labels.numpy(),
            notes=outcome.notes,
            reliability=best.reliability.numpy(),
        ),
    )


def write_per_class(path: Path, names: list[str], counts: Tensor, confusion: Tensor) -> None:
    """Writes a row for each class: training images [C], test images, accuracy (recall), precision; unknown: empty."""
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["class", "training_images", "test_images", "accuracy", "precision"])
    accuracy, precision = (_plain(f(confusion)) for f in (metrics.per_class_accuracy, metrics.per_class_precision))
    table.writerows(zip(names, counts.tolist(), confusion.sum(dim=1).tolist(), accuracy, precision, strict=True))
    write_text(path, rows.getvalue())


def show(figures: dict[str, Any]) -> None:
    """Prints the table of the test set's figures."""
    which = f"epoch {figures['best_epoch']}, selected on {figures['selected_on']}"
    show_beside(f"test set, {which if figures['best_epoch'] else 'untrained'}", {"value": figures})


def show_beside(title: str, columns: dict[str, dict[str, Any]]) -> None:
    """Prints several networks' figures side by side, under their names; it names the last one's last epoch."""
    table = Table("", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    last = list(columns.values())[-1]["last_epoch"]
    for label, key in {**_SHOWN, f"balanced accuracy, last epoch ({last})": "last_epoch_balanced_accuracy"}.items():
        values = [figures.get(key) for figures in columns.values()]
        table.add_row(label, *("–" if value is None else f"{value:.1%}" for value in values))
    print_table(table)


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
    """Returns images, mean confidence and accuracy of each bin; the latter two are None where it has no image."""
    images, confidence, right = bins.unbind(dim=1)
    return {
        "images": images.long().tolist(),
        "confidence": _plain(confidence / images),
        "accuracy": _plain(right / images),
    }


def _plain(values: Tensor) -> list[float | None]:
    """Returns the values with None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
