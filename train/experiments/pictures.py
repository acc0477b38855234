"""Figure 3: features of the test images in two dimensions, before and after.

matplotlib draws it: the figure is an image file, and plotly, which draws the report, needs a browser to write one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments.features import features_of_test_images
from rcl_fast.train.inference import best_checkpoint
from rcl_fast.train.report.feature_map import balanced_subset, tsne
from rcl_fast.train.rundir.result_files import read_json
from rcl_fast.train.runtime.files import write_text

MOST_POINTS = 3_000
_NAMED_CLASSES = 10
_PARTS = {"run", "seed", "x", "y", "labels", "class_names"}  # of a panel

_logger = logging.getLogger(__name__)


def check_drawable() -> None:
    """Raises UserError, before hours of training, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("figure3 is drawn by matplotlib: pip install matplotlib") from None


def points_of(run: Path, data: Path | None) -> dict[str, Any]:
    """Returns t-SNE of the best epoch's backbone features, for at most MOST_POINTS images, evenly over the classes."""
    features = features_of_test_images(run, best_checkpoint(run), data)
    chosen = balanced_subset(features.labels, MOST_POINTS)
    flat = tsne(features.backbone[chosen])
    flat = np.zeros((len(chosen), 2)) if flat is None else flat
    return {
        "x": flat[:, 0].round(2).tolist(),
        "y": flat[:, 1].round(2).tolist(),
        "labels": features.labels[chosen].tolist(),
        "class_names": features.class_names,
    }


def write(panels: Mapping[str, dict[str, Any]], title: str, file: Path) -> list[Path]:
    """Writes the points as JSON, and the picture of them as SVG and PNG; returns the files."""
    data = _points_file(file)
    write_text(data, json.dumps({"title": title, "panels": panels}) + "\n")
    return [data, *draw(data, file)]


def read_points(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the panels that an earlier `write` has left, if any; those of a damaged file are computed anew."""
    try:
        panels = read_json(_points_file(file)).get("panels", {})
        return {label: points for label, points in panels.items() if points.keys() >= _PARTS}
    except (UserError, AttributeError) as error:
        _logger.warning(f"the points of the picture are computed anew: {error}")
        return {}


def _points_file(file: Path) -> Path:
    return file.with_name(file.name + ".points.json")


def draw(data: Path, file: Path) -> list[Path]:
    """Draws the picture of a file of points as SVG and PNG; returns the files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    content = json.loads(data.read_text(encoding="utf-8"))
    panels = content["panels"]
    few = all(len(points["class_names"]) <= _NAMED_CLASSES for points in panels.values())
    figure = Figure(figsize=(5 * len(panels), 5.2), layout="constrained")
    runs = "; ".join(f"{name}: run {points['run']}, seed {points['seed']}" for name, points in panels.items())
    figure.suptitle(f"{content['title']}\n{runs}", fontsize=9, wrap=True)
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, name, points, mpl.colormaps["tab10" if few else "turbo"])
    if few:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2, fontsize=8)
    written = [file.with_name(file.name + ending) for ending in (".svg", ".png")]
    with mpl.rc_context({"svg.hashsalt": "figure3"}):  # the same points give the same bytes
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=150)
    return written


def _panel(axes: Any, name: str, points: dict[str, Any], colours: Any) -> None:
    labels, class_names = np.array(points["labels"]), points["class_names"]
    for number, class_name in enumerate(class_names):
        x, y = (np.array(points[axis])[labels == number] for axis in ("x", "y"))
        axes.scatter(x, y, s=6, color=colours.resampled(len(class_names))(number), label=class_name, linewidths=0)
    axes.set_title(name)
    axes.set_xticks([])
    axes.set_yticks([])
