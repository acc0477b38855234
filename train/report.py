"""The training report: one HTML file that opens offline, with every figure drawn by an inlined plotly.js."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import plotly.graph_objects as go
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from rcl_fast.metrics import FEW_BELOW, MANY_ABOVE, expected_calibration_error

# Okabe and Ito's palette, which colour-blind readers can tell apart; its black and yellow fail on dark or light pages.
BLUE, GREEN, VERMILLION, ORANGE, SKY, PURPLE, GREY = (
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
    "#8A8F98",
)
CLASS_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, GREY)
CLASS_SYMBOLS = ("circle", "diamond", "x")  # with the colours: 21 looks for the at most 20 classes of a legend
RANK_SCALE = [[0.0, BLUE], [0.4, SKY], [0.6, ORANGE], [1.0, VERMILLION]]
GRID = "rgba(128, 128, 128, 0.22)"

NAMED_TICKS = 30  # more class names than this do not fit an axis
BARS = 50
CELLS_WITH_NUMBERS = 12
CONFUSION_BINS = 100
LEGEND_CLASSES = 20
EMBEDDED_POINTS = 2_000
EMBEDDED_MINIMUM = 5


@dataclass(frozen=True)
class Report:
    """What one run has to tell. Accuracies are fractions 0..1; a number that is not known is None or NaN.

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


class Group(NamedTuple):
    """Classes alike in their number of training images, in the literature's bounds."""

    name: str
    images: str
    colour: str
    members: NDArray[np.bool_]


class Tile(NamedTuple):
    """One number of the headline."""

    label: str
    value: str
    detail: str
    colour: str | None = None


class Panel(NamedTuple):
    """A figure under its title and text; without a figure, the text says why there is none."""

    title: str
    text: str
    figure: go.Figure | None


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
    return environment.get_template("report.html.jinja")


def _check(report: Report) -> None:
    classes = len(report.class_names)
    accuracies = report.metrics.get("per_class_accuracy")
    found = {
        "class_counts": (len(report.class_counts),),
        "confusion": report.confusion.shape,
        "metrics['per_class_accuracy']": (classes if accuracies is None else len(accuracies),),
    }
    for field, shape in found.items():
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
    best = _number(report.metrics.get("best_epoch"))
    selected_on = report.metrics.get("selected_on")
    return {
        "accuracy": accuracy_curves(report.history, best, selected_on),
        "loss": loss_curves(report.history, best),
        "learning_rate": learning_rate_curve(report.history, best),
        "classes": class_accuracies(report.class_names, report.class_counts, _accuracies(report)),
        "confusion": confusion_matrix(report.class_names, report.class_counts, report.confusion),
        "embeddings": embedding_map(
            report.class_names, report.class_counts, report.embeddings, report.embedding_labels
        ),
        "reliability": reliability_diagram(report.reliability),
        "confidence": confidence_histogram(report.reliability),
    }


def _number(value: Any) -> float:
    """`value` as a float; NaN for None, infinities and whatever is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _format(value: Any, pattern: str) -> str:
    number = _number(value)
    return "–" if math.isnan(number) else pattern.format(number)


def _percent(fraction: Any) -> str:
    return _format(100 * _number(fraction), "{:.1f} %")


def _plural(count: float, noun: str, nouns: str | None = None) -> str:
    """`count` things in words: "no class", "1 class", "1,200 classes"."""
    if count == 0:
        return f"no {noun}"
    return f"{count:,.0f} {noun if count == 1 else nouns or noun + 's'}"


def _accuracies(report: Report) -> NDArray[np.float64]:
    """Accuracy of each class [C], NaN where unknown."""
    values = report.metrics.get("per_class_accuracy")
    if values is None:
        return np.full(len(report.class_names), np.nan)
    return np.array([_number(value) for value in values])


def _by_count(counts: Sequence[int]) -> NDArray[np.intp]:
    """The classes from most to fewest training images [C]."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def _groups(counts: Sequence[int]) -> list[Group]:
    images = np.asarray(counts)
    return [
        Group("many", f"over {MANY_ABOVE} images", BLUE, images > MANY_ABOVE),
        Group(
            "medium",
            f"{FEW_BELOW} to {MANY_ABOVE} images",
            GREEN,
            (images >= FEW_BELOW) & (images <= MANY_ABOVE),
        ),
        Group("few", f"under {FEW_BELOW} images", VERMILLION, images < FEW_BELOW),
    ]


def _label(name: str, width: int | None = None) -> str:
    """A class name as plotly shall show it: plotly reads a few HTML tags and entities in any text."""
    return html.escape(name if width is None or len(name) <= width else name[: width - 1] + "…", quote=False)


def _banner(report: Report) -> str | None:
    if not report.metrics.get("interrupted"):
        return None
    if not report.history:
        return "This run was interrupted before its first epoch was finished: there is little to see yet."
    return (
        f"This run was interrupted after {_plural(len(report.history), 'finished epoch')}: "
        "everything below is what it had reached by then."
    )


def _tiles(report: Report) -> list[Tile]:
    metrics = report.metrics
    selected_on = metrics.get("selected_on")
    return [
        Tile("Balanced accuracy", _percent(metrics.get("balanced_accuracy")), "test set, mean over the classes"),
        Tile("Harmonic mean", _percent(metrics.get("harmonic_mean")), _at_zero(metrics.get("classes_at_zero"))),
        *(
            Tile(
                group.name.capitalize(),
                _percent(metrics.get(group.name)),
                f"{_plural(int(group.members.sum()), 'class', 'classes')} of {group.images}",
                group.colour,
            )
            for group in _groups(report.class_counts)
        ),
        _worst_class(report),
        Tile(
            "Best epoch",
            _format(metrics.get("best_epoch"), "{:.0f}"),
            f"selected on {selected_on}" if selected_on else "",
        ),
    ]


def _at_zero(classes: Any) -> str:
    count = _number(classes)
    if math.isnan(count):
        return ""
    at_zero = f"{_plural(count, 'class', 'classes')} at 0 %"
    return f"0 because of {at_zero}" if count else at_zero


def _worst_class(report: Report) -> Tile:
    accuracies = _accuracies(report)
    if np.isnan(accuracies).all():
        return Tile("Worst class", "–", "")
    worst = int(np.nanargmin(accuracies))
    alike = int((accuracies == accuracies[worst]).sum()) - 1
    others = f", and {_plural(alike, 'other')}" if alike else ""
    return Tile("Worst class", _percent(accuracies[worst]), report.class_names[worst] + others)


def _facts(metrics: dict[str, Any]) -> dict[str, str]:
    return {
        "Geometric mean": _percent(metrics.get("geometric_mean")),
        "Calibration error (ECE)": _percent(metrics.get("expected_calibration_error")),
        "Balanced accuracy of the last epoch": _percent(metrics.get("last_epoch_balanced_accuracy")),
        "Parameters": _format(metrics.get("parameters"), "{:,.0f}"),
        "Training speed": _format(metrics.get("images_per_second"), "{:,.0f} images/s"),
    }


def _figure(**layout: Any) -> go.Figure:
    return _style(go.Figure(), **layout)


def _style(figure: go.Figure, **layout: Any) -> go.Figure:
    """The look all figures share; fonts and the colours of light and dark pages are the page's to set."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        margin={"l": 8, "r": 12, "t": 16, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True, title={"standoff": 10, "font_size": 13})
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True, title={"standoff": 10, "font_size": 13})
    return figure.update_layout(**layout)


def _column(history: list[dict[str, float]], key: str) -> NDArray[np.float64]:
    return np.array([_number(row.get(key)) for row in history])


class Curve(NamedTuple):
    key: str
    name: str
    colour: str
    dash: str = "solid"


def _curves(
    history: list[dict[str, float]],
    curves: list[Curve],
    best_epoch: float,
    *,
    axis: str,
    hover: str,
    label: Literal["top", "middle", "bottom"],
    scale: float = 1,
) -> go.Figure | None:
    """The curves that the history holds, over epochs; None when it holds none of them.

    `label` is where these curves leave room for the best epoch's label.
    """
    figure = _figure(hovermode="x unified", xaxis_title_text="epoch", yaxis_title_text=axis)
    rows = np.arange(1, len(history) + 1)
    epochs = np.where(np.isnan(_column(history, "epoch")), rows, _column(history, "epoch"))
    for curve in curves:
        values = scale * _column(history, curve.key)
        if np.isfinite(values).any():
            figure.add_scatter(
                x=epochs,
                y=values,
                name=curve.name,
                mode="lines+markers" if len(history) <= 30 else "lines",
                line={"color": curve.colour, "dash": curve.dash, "width": 2},
                hovertemplate=hover,
            )
    if not figure.data:
        return None
    if len(history) <= 10:
        figure.update_xaxes(dtick=1)
    if not math.isnan(best_epoch):
        figure.add_vline(
            best_epoch,
            line={"color": GREY, "dash": "dot", "width": 1.5},
            annotation={
                "text": f"best epoch {best_epoch:.0f}",
                "y": {"top": 1, "middle": 0.5, "bottom": 0}[label],
                "yanchor": label,
                "xanchor": "right" if best_epoch > epochs.mean() else "left",
            },
        )
    return figure


def _absent(what: str) -> str:
    return f"No figure: the run recorded no {what}."


def accuracy_curves(history: list[dict[str, float]], best_epoch: float, selected_on: str | None) -> Panel:
    """Balanced accuracy, harmonic mean and the groups' accuracies, in percent."""
    curves = [
        Curve("balanced_accuracy", "balanced accuracy", PURPLE),
        Curve("harmonic_mean", "harmonic mean", ORANGE, "dash"),
        Curve("many", "many", BLUE),
        Curve("medium", "medium", GREEN),
        Curve("few", "few", VERMILLION),
    ]
    figure = _curves(history, curves, best_epoch, axis="accuracy (%)", hover="%{y:.1f} %", label="bottom", scale=100)
    if figure:
        figure.update_yaxes(rangemode="tozero")
    chosen = f", on the images that chose the best epoch: {selected_on}" if selected_on else ""
    return Panel("Accuracy", f"After each epoch{chosen}." if figure else _absent("accuracy of an epoch"), figure)


def loss_curves(history: list[dict[str, float]], best_epoch: float) -> Panel:
    """The loss that is minimised, and its two parts."""
    curves = [
        Curve("loss", "total", PURPLE),
        Curve("cross_entropy", "cross-entropy", SKY),
        Curve("contrastive", "contrastive", ORANGE, "dash"),
    ]
    figure = _curves(history, curves, best_epoch, axis="loss (nats)", hover="%{y:.4f}", label="top")
    text = "Mean over the training batches of each epoch; the total weighs the two parts."
    return Panel("Training loss", text if figure else _absent("loss"), figure)


def learning_rate_curve(history: list[dict[str, float]], best_epoch: float) -> Panel:
    """The learning rate of each epoch."""
    curves = [Curve("learning_rate", "learning rate", GREY)]
    figure = _curves(history, curves, best_epoch, axis="learning rate", hover="%{y:.5g}", label="middle")
    if figure:
        figure.update_yaxes(rangemode="tozero")
    return Panel("Learning rate", "The schedule as it was followed." if figure else _absent("learning rate"), figure)


def class_accuracies(names: list[str], counts: Sequence[int], accuracies: NDArray[np.float64]) -> Panel:
    """Accuracy of each class above its number of training images, classes sorted by that number."""
    title = "Accuracy of each class"
    if np.isnan(accuracies).all():
        return Panel(title, _absent("accuracy of a class"), None)
    order = _by_count(counts)
    classes = len(order)
    ranks = np.arange(1, classes + 1)
    images = np.asarray(counts)[order]
    percent = 100 * accuracies[order]
    labels = np.array([_label(names[index]) for index in order])
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.64, 0.36])
    for group in _groups(images.tolist()):
        here = group.members
        if not here.any():
            continue
        points = {
            "x": ranks[here],
            "y": percent[here],
            "name": f"{group.name} ({group.images})",
            "hovertext": labels[here],
            "customdata": images[here],
            "hovertemplate": "%{hovertext}<br>%{y:.1f} % right<br>%{customdata:,} training images<extra></extra>",
        }
        if classes <= BARS:
            figure.add_trace(go.Bar(marker_color=group.colour, **points), row=1, col=1)
        else:
            marker = {"color": group.colour, "size": 6 if classes <= 300 else 4, "opacity": 0.65}
            figure.add_trace(go.Scatter(mode="markers", marker=marker, **points), row=1, col=1)
    if classes > BARS:
        window = max(5, classes // 40)
        average = go.Scatter(
            x=ranks,
            y=_rolling_mean(percent, window),
            name=f"mean of {window} neighbours",
            line={"color": PURPLE, "width": 3},
            hoverinfo="skip",
        )
        figure.add_trace(average, row=1, col=1)
    shown = go.Scatter(
        x=ranks,
        y=np.where(images > 0, images, np.nan),  # a log axis has no place for 0
        mode="lines+markers" if classes <= BARS else "lines",
        line={"color": GREY, "width": 2},
        hovertext=labels,
        hovertemplate="%{hovertext}<br>%{y:,} training images<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(shown, row=2, col=1)
    _style(figure, bargap=0.25, legend_itemsizing="constant")
    figure.update_yaxes(title_text="accuracy (%)", range=[0, 102], row=1, col=1)
    figure.update_yaxes(title_text="training images", type="log", tickformat=",", row=2, col=1)
    figure.update_xaxes(range=[0.4, classes + 0.6])
    if classes <= NAMED_TICKS:
        ticks = [_label(names[index], 14) for index in order]
        figure.update_xaxes(tickmode="array", tickvals=ranks, ticktext=ticks, showgrid=False)
    else:
        figure.update_xaxes(title_text="class, from most to fewest training images", row=2, col=1)
    text = "Test accuracy above, training images (log scale) below; classes from most to fewest training images."
    return Panel(title, text, figure)


def _rolling_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the finite values among `window` neighbours, fewer at the ends [C]."""
    known = np.isfinite(values)
    ones = np.ones(window)
    sums = np.convolve(np.where(known, values, 0), ones, mode="same")
    seen = np.convolve(known, ones, mode="same")
    return np.divide(sums, seen, out=np.full(len(values), np.nan), where=seen > 0)


def confusion_matrix(names: list[str], counts: Sequence[int], confusion: NDArray[np.integer]) -> Panel:
    """Share of each true class (row) that was predicted as each class (column), in bins where classes are many."""
    title = "Confusion"
    if not confusion.any():
        return Panel(title, "No figure: no test image was classified.", None)
    order = _by_count(counts)
    bins = np.array_split(np.arange(len(order)), min(len(order), CONFUSION_BINS))
    starts = [members[0] for members in bins]
    sorted_rows = confusion[np.ix_(order, order)].astype(np.int64)
    images = np.add.reduceat(np.add.reduceat(sorted_rows, starts, axis=0), starts, axis=1)
    totals = images.sum(axis=1, keepdims=True)
    share = np.divide(100 * images, totals, out=np.full(images.shape, np.nan), where=totals > 0)

    # Categories are text that no class name can double, as two names may look the same to plotly.
    labels = [_bin_label([names[order[rank]] for rank in members], members) for members in bins]
    step = 1 if len(bins) <= NAMED_TICKS else math.ceil(len(bins) / 10)
    if len(bins) <= NAMED_TICKS:
        ticks = [_label(names[order[rank]], 14) for rank in starts]
    else:
        ticks = [f"{rank + 1:,}" for rank in starts[::step]]
    figure = _figure(coloraxis={"cmin": 0, "cmax": 100, "colorbar": _top_colourbar("share of the true class (%)")})
    figure.add_heatmap(
        x=labels,
        y=labels,
        z=share.astype(np.float32),
        customdata=images,
        coloraxis="coloraxis",
        texttemplate="%{z:.0f}" if len(bins) <= CELLS_WITH_NUMBERS else None,
        xgap=1 if len(bins) <= NAMED_TICKS else 0,
        ygap=1 if len(bins) <= NAMED_TICKS else 0,
        hoverongaps=False,
        hovertemplate="true: %{y}<br>predicted: %{x}<br>%{z:.1f} % of the row, %{customdata:,} images<extra></extra>",
    )
    axis = {"type": "category", "tickvals": labels[::step], "ticktext": ticks, "showgrid": False}
    rank = "" if len(bins) <= NAMED_TICKS else ", by rank in training images"
    figure.update_xaxes(title_text=f"predicted class{rank}", **axis)
    figure.update_yaxes(title_text=f"true class{rank}", autorange="reversed", **axis)

    text = "Each row is a true class and sums to 100 %; classes from most to fewest training images."
    if len(bins) < len(order):
        text = (
            f"The {len(order):,} classes are sorted from most to fewest training images and added up in "
            f"{len(bins)} bins of about {len(order) / len(bins):.0f}; each row sums to 100 %. "
            "The diagonal counts a class taken for another one of its bin as well, so it is no accuracy."
        )
    return Panel(title, text, figure)


def _bin_label(names: list[str], ranks: NDArray[np.intp]) -> str:
    if len(names) == 1:
        return f"{_label(names[0])} (rank {ranks[0] + 1})"
    return f"ranks {ranks[0] + 1:,}–{ranks[-1] + 1:,} ({_label(names[0], 24)} … {_label(names[-1], 24)})"


def _top_colourbar(title: str) -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 8,
        "x": 0.5,
        "y": 1.02,
        "yanchor": "bottom",
        "title": {"text": title, "side": "top", "font_size": 13},
        "outlinewidth": 0,
    }


def embedding_map(
    names: list[str],
    counts: Sequence[int],
    embeddings: NDArray[np.floating] | None,
    labels: NDArray[np.integer] | None,
) -> Panel:
    """The features in two dimensions, a colour a class; beyond 20 classes the colour is the class's rank."""
    title = "Features of the test images"
    if embeddings is None or labels is None:
        return Panel(title, "No figure: the run kept no features.", None)
    known = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
    chosen = known[balanced_subset(labels[known], EMBEDDED_POINTS)]
    if len(chosen) < EMBEDDED_MINIMUM:
        return Panel(
            title, f"No figure: t-SNE needs at least {EMBEDDED_MINIMUM} images, and there were {len(chosen)}.", None
        )
    points = tsne(embeddings[chosen])
    if points is None:
        return Panel(title, "No figure: the features of all images are the same, so the model has collapsed.", None)
    order = _by_count(counts)
    figure = _figure(legend_itemsizing="constant", margin={"l": 36, "b": 36})
    if len(order) <= LEGEND_CLASSES:
        _add_classes(figure, names, order, points, labels[chosen])
    else:
        _add_ranks(figure, names, order, points, labels[chosen])
    figure.update_xaxes(showticklabels=False, showgrid=False, title_text="t-SNE 1 (no unit)")
    figure.update_yaxes(showticklabels=False, showgrid=False, title_text="t-SNE 2 (no unit)")
    text = (
        f"{len(chosen):,} images, spread evenly over the classes, by t-SNE of the L2-normalised features. "
        "Near points are alike; distances between far groups and their sizes mean nothing."
    )
    return Panel(title, text, figure)


def _add_classes(
    figure: go.Figure,
    names: list[str],
    order: NDArray[np.intp],
    points: NDArray[np.float64],
    labels: NDArray[np.integer],
) -> None:
    for rank, index in enumerate(order):
        here = labels == index
        symbol = CLASS_SYMBOLS[rank // len(CLASS_COLOURS)]
        figure.add_scatter(
            x=points[here, 0],
            y=points[here, 1],
            mode="markers",
            name=_label(names[index], 14),
            marker={"color": CLASS_COLOURS[rank % len(CLASS_COLOURS)], "symbol": symbol, "size": 5, "opacity": 0.8},
            hovertemplate=f"{_label(names[index])}<extra></extra>",
        )


def _add_ranks(
    figure: go.Figure,
    names: list[str],
    order: NDArray[np.intp],
    points: NDArray[np.float64],
    labels: NDArray[np.integer],
) -> None:
    ranks = np.argsort(order)[labels] + 1
    figure.add_scatter(
        x=points[:, 0],
        y=points[:, 1],
        mode="markers",
        hovertext=[_label(names[index]) for index in labels],
        marker={
            "color": ranks,
            "cmin": 1,
            "cmax": len(order),
            "colorscale": RANK_SCALE,
            "size": 5,
            "opacity": 0.8,
            "colorbar": _top_colourbar("class, from most to fewest training images"),
        },
        hovertemplate="%{hovertext}<br>rank %{marker.color:,} in training images<extra></extra>",
    )


def reliability_diagram(bins: NDArray[np.floating] | None) -> Panel:
    """Accuracy against confidence, in bins [M, 3] of it (Guo et al., ICML 2017, figure 1)."""
    title = "Reliability"
    if bins is None or not bins[:, 0].any():
        return Panel(title, _absent("confidence of a test image"), None)
    images, confidences, right = bins.T
    width = 100 / len(bins)
    accuracy, confidence = (
        np.divide(100 * sums, images, out=np.full(len(bins), np.nan), where=images > 0) for sums in (right, confidences)
    )
    points = {"customdata": np.stack([images, confidence], axis=1), "hovertemplate": _OF_BIN}
    figure = _figure()
    figure.add_bar(
        x=width * (np.arange(len(bins)) + 0.5), y=accuracy, width=width, name="accuracy", marker_color=SKY, **points
    )
    figure.add_scatter(
        x=confidence,
        y=accuracy,
        mode="markers",
        name="accuracy at the bin's mean confidence",
        marker={"color": VERMILLION, "size": 8},
        **points,
    )
    calibrated = {"color": GREY, "dash": "dash", "width": 2}
    figure.add_scatter(
        x=[0, 100], y=[0, 100], mode="lines", name="calibrated", line=calibrated, hoverinfo="skip", showlegend=True
    )
    _style(figure, bargap=0, xaxis_title_text="confidence (%)", yaxis_title_text="accuracy (%)")
    figure.update_xaxes(range=[0, 100])
    figure.update_yaxes(range=[0, 102])
    error = expected_calibration_error(torch.from_numpy(bins))
    gap = (confidences.sum() - right.sum()) / images.sum()
    too = "over" if gap > 0 else "under"
    text = (
        f"ECE {_percent(error)}: how far accuracy lies from confidence, on "
        f"average over the test images, in {len(bins)} bins of equal width. On the whole the network is "
        f"{too}confident, by {_percent(abs(gap))}. The confidence is the largest softmax of the raw logits, which the "
        "classes are chosen by, without any adjustment or temperature."
    )
    return Panel(title, text, figure)


_OF_BIN = "%{y:.1f} % right<br>mean confidence %{customdata[1]:.1f} %<br>%{customdata[0]:,} test images<extra></extra>"


def confidence_histogram(bins: NDArray[np.floating] | None) -> Panel:
    """How many test images each bin [M, 3] of the reliability diagram has."""
    title = "Confidence"
    if bins is None or not bins[:, 0].any():
        return Panel(title, _absent("confidence of a test image"), None)
    width = 100 / len(bins)
    images = bins[:, 0]
    figure = _figure(bargap=0, xaxis_title_text="confidence (%)", yaxis_title_text="test images (%)")
    figure.add_bar(
        x=width * (np.arange(len(bins)) + 0.5),
        y=100 * images / images.sum(),
        width=width,
        marker={"color": BLUE, "line": {"width": 1, "color": GRID}},
        customdata=images,
        hovertemplate="%{y:.1f} % of the test images, %{customdata:,}<extra></extra>",
    )
    figure.update_xaxes(range=[0, 100])
    return Panel(title, "How sure the network is: the share of the test images in each of the bins.", figure)


def balanced_subset(labels: NDArray[np.integer], size: int) -> NDArray[np.intp]:
    """At most `size` indices into `labels`, as evenly over the classes as they allow; the same ones every time."""
    tie = np.random.default_rng(0).permutation(len(labels))
    by_class = np.lexsort((tie, labels))
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(starts, sizes)  # every class gives its first image, then its second
    return np.sort(by_class[np.lexsort((tie[by_class], turn))[:size]])


def tsne(features: NDArray[np.floating]) -> NDArray[np.float64] | None:
    """`features` [n >= 5, D] in two dimensions [n, 2]; None when they are all the same direction."""
    unit = normalize(features.astype(np.float64))
    if unit.std(axis=0).max() < 1e-9:
        return None
    reduced = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit)
    flat = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))  # t-SNE starts from two components
    perplexity = min(30.0, (len(flat) - 1) / 3)
    with threadpool_limits(1):  # the same picture whatever the cores, which a training machine keeps busy anyway
        return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat).astype(np.float64)


def _tables(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The configuration's sections, each flattened; what stands outside a section comes first."""
    loose = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    return {name: _flatten(values) for name, values in {"general": loose, **sections}.items() if values}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested `values` as {dotted name: text}."""
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
        return _format(value, "{:.6g}")
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(_text(item) for item in value) if len(value) <= 20 else f"{len(value):,} values"
    return "–" if value is None else str(value)
