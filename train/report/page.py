"""The report: one HTML file that opens offline, with every figure drawn by an inlined plotly.js."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from rcl_fast.train.report import feature_map, style
from rcl_fast.train.report.calibration import confidence_histogram, reliability_diagram
from rcl_fast.train.report.classes import class_accuracies, confusion_matrix
from rcl_fast.train.report.curves import accuracy_curves, learning_rate_curve, loss_curves
from rcl_fast.train.report.style import Panel


@dataclass(frozen=True)
class Report:
    """The content of one run's report. Accuracies are fractions 0..1; a number that is not known is None or NaN.

    `class_counts` are training images per class; `confusion` [C, C] counts test images (rows true, columns predicted);
    `embeddings` [n, D] are backbone features of test images and `embedding_labels` [n] their classes; `reliability`
    [M, 3] is what `rcl_fast.metrics.reliability` counts of the test images.
    """

    title: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    class_names: list[str]
    class_counts: list[int]
    confusion: NDArray[np.integer]
    embeddings: NDArray[np.floating] | None
    embedding_labels: NDArray[np.integer] | None
    notes: list[str]
    reliability: NDArray[np.floating] | None = None


class Tile(NamedTuple):
    """One number of the headline."""

    label: str
    value: str
    detail: str
    colour: str | None = None


def write_report(path: Path, report: Report) -> None:
    """Writes `report` to `path` as one HTML file. Raises ValueError where the classes' fields disagree in length."""
    _check(report)
    panels = _panels(report)
    figures = {name: json.loads(p.figure.to_json()) for name, p in panels.items() if p.figure is not None}
    page = _template().render(
        report=report,
        banner=_banner(report),
        tiles=_tiles(report),
        facts=_facts(report.metrics),
        panels=panels,
        figures=figures,
        tables=_tables(report.config),
        metrics=_flatten(report.metrics),
        plotlyjs=Markup(get_plotlyjs()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # A class is named after its folder, and a folder's name need not be valid Unicode.
    path.write_text(page, encoding="utf-8", errors="replace")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("page.html.jinja")


def _check(report: Report) -> None:
    classes = len(report.class_names)
    accuracies = report.metrics.get("per_class_accuracy")
    shapes = {
        "class_counts": (len(report.class_counts),),
        "confusion": report.confusion.shape,
        "metrics['per_class_accuracy']": (classes if accuracies is None else len(accuracies),),
    }
    for field, shape in shapes.items():
        if any(size != classes for size in shape):
            raise ValueError(
                f"Report.{field} has shape {shape}, but class_names has {classes} names: "
                "all of them list the same classes, in the same order."
            )
    if report.embeddings is not None and (
        report.embedding_labels is None or len(report.embedding_labels) != len(report.embeddings)
    ):
        raise ValueError("Report.embedding_labels must hold one class per row of Report.embeddings.")


def _panels(report: Report) -> dict[str, Panel]:
    best = style.number(report.metrics.get("best_epoch"))
    selected_on = report.metrics.get("selected_on")
    return {
        "accuracy": accuracy_curves(report.history, best, selected_on),
        "loss": loss_curves(report.history, best),
        "learning_rate": learning_rate_curve(report.history, best),
        "classes": class_accuracies(report.class_names, report.class_counts, _accuracies(report)),
        "confusion": confusion_matrix(report.class_names, report.class_counts, report.confusion),
        "embeddings": feature_map.embedding_map(
            report.class_names, report.class_counts, report.embeddings, report.embedding_labels
        ),
        "reliability": reliability_diagram(report.reliability),
        "confidence": confidence_histogram(report.reliability),
    }


def _accuracies(report: Report) -> NDArray[np.float64]:
    """Returns the accuracy of each class [C], NaN where it is not known."""
    values = report.metrics.get("per_class_accuracy")
    if values is None:
        return np.full(len(report.class_names), np.nan)
    return np.array([style.number(value) for value in values])


def _banner(report: Report) -> str | None:
    if not report.metrics.get("interrupted"):
        return None
    if not report.history:
        return "This run was interrupted before its first epoch was finished: there is little to see yet."
    return (
        f"This run was interrupted after {style.plural(len(report.history), 'finished epoch')}: "
        "everything below is what it had reached by then."
    )


def _tiles(report: Report) -> list[Tile]:
    metrics = report.metrics
    selected_on = metrics.get("selected_on")
    return [
        Tile("Balanced accuracy", style.percent(metrics.get("balanced_accuracy")), "test set, mean over the classes"),
        Tile("Harmonic mean", style.percent(metrics.get("harmonic_mean")), _at_zero(metrics.get("classes_at_zero"))),
        *(
            Tile(
                group.name.capitalize(),
                style.percent(metrics.get(group.name)),
                f"{style.plural(int(group.members.sum()), 'class', 'classes')} of {group.images}",
                group.colour,
            )
            for group in style.groups(report.class_counts)
        ),
        _worst_class(report),
        Tile(
            "Best epoch",
            style.formatted(metrics.get("best_epoch"), "{:.0f}"),
            f"selected on {selected_on}" if selected_on else "",
        ),
    ]


def _at_zero(classes: Any) -> str:
    count = style.number(classes)
    if math.isnan(count):
        return ""
    at_zero = f"{style.plural(count, 'class', 'classes')} at 0 %"
    return f"0 because of {at_zero}" if count else at_zero


def _worst_class(report: Report) -> Tile:
    accuracies = _accuracies(report)
    if np.isnan(accuracies).all():
        return Tile("Worst class", "–", "")
    worst = int(np.nanargmin(accuracies))
    alike = int((accuracies == accuracies[worst]).sum()) - 1
    others = f", and {style.plural(alike, 'other')}" if alike else ""
    return Tile("Worst class", style.percent(accuracies[worst]), report.class_names[worst] + others)


def _facts(metrics: dict[str, Any]) -> dict[str, str]:
    return {
        "Geometric mean": style.percent(metrics.get("geometric_mean")),
        "Calibration error (ECE)": style.percent(metrics.get("expected_calibration_error")),
        "Balanced accuracy of the last epoch": style.percent(metrics.get("last_epoch_balanced_accuracy")),
        "Parameters": style.formatted(metrics.get("parameters"), "{:,.0f}"),
        "Training speed": style.formatted(metrics.get("images_per_second"), "{:,.0f} images/s"),
    }


def _tables(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Returns the configuration's sections, each flattened; values outside of a section come first."""
    loose = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    return {name: _flatten(values) for name, values in {"general": loose, **sections}.items() if values}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested `values` as {dotted name: text}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _text(value)
    return flat


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return style.formatted(value, "{:.6g}")
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(_text(item) for item in value) if len(value) <= 20 else f"{len(value):,} values"
    return "–" if value is None else str(value)
