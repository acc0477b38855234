"""The report's figures of classes: accuracy beside class counts, confusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from rcl_fast.train.report import style
from rcl_fast.train.report.style import GREY, NAMED_TICKS, PURPLE, Panel

BARS = 50
CELLS_WITH_NUMBERS = 12
CONFUSION_BINS = 100


def class_accuracies(names: list[str], counts: Sequence[int], accuracies: NDArray[np.float64]) -> Panel:
    """Draws the accuracy of each class above its number of training images, by which the classes are sorted."""
    title = "Accuracy of each class"
    if np.isnan(accuracies).all():
        return Panel(title, style.absent("accuracy of a class"), None)
    order = style.by_count(counts)
    classes = len(order)
    ranks = np.arange(1, classes + 1)
    images = np.asarray(counts)[order]
    percent = 100 * accuracies[order]
    labels = np.array([style.label(names[index]) for index in order])
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.64, 0.36])
    for group in [group for group in style.groups(images.tolist()) if group.members.any()]:
        here = group.members
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
    style.styled(figure, bargap=0.25, legend_itemsizing="constant")
    figure.update_yaxes(title_text="accuracy (%)", range=[0, 102], row=1, col=1)
    figure.update_yaxes(title_text="training images", type="log", tickformat=",", row=2, col=1)
    figure.update_xaxes(range=[0.4, classes + 0.6])
    if classes <= NAMED_TICKS:
        ticks = [style.label(names[index], 14) for index in order]
        figure.update_xaxes(tickmode="array", tickvals=ranks, ticktext=ticks, showgrid=False)
    else:
        figure.update_xaxes(title_text="class, from most to fewest training images", row=2, col=1)
    text = "Test accuracy above, training images (log scale) below; classes from most to fewest training images."
    return Panel(title, text, figure)


def _rolling_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Returns for each value [C] the mean of the finite ones among `window` neighbours, fewer at the ends."""
    known = np.isfinite(values)
    ones = np.ones(window)
    sums = np.convolve(np.where(known, values, 0), ones, mode="same")
    seen = np.convolve(known, ones, mode="same")
    return np.divide(sums, seen, out=np.full(len(values), np.nan), where=seen > 0)


def confusion_matrix(names: list[str], counts: Sequence[int], confusion: NDArray[np.integer]) -> Panel:
    """Draws the share of each true class (row) predicted as each class (column), in bins where classes are many."""
    title = "Confusion"
    if not confusion.any():
        return Panel(title, "No figure: no test image was classified.", None)
    order = style.by_count(counts)
    bins = np.array_split(np.arange(len(order)), min(len(order), CONFUSION_BINS))
    starts = [members[0] for members in bins]
    sorted_rows = confusion[np.ix_(order, order)].astype(np.int64)
    images = np.add.reduceat(np.add.reduceat(sorted_rows, starts, axis=0), starts, axis=1)
    totals = images.sum(axis=1, keepdims=True)
    share = np.divide(100 * images, totals, out=np.full(images.shape, np.nan), where=totals > 0)

    # Categories are texts made unique by the rank: two class names may look the same to plotly.
    labels = [_bin_label([names[order[rank]] for rank in members], members) for members in bins]
    step = 1 if len(bins) <= NAMED_TICKS else math.ceil(len(bins) / 10)
    if len(bins) <= NAMED_TICKS:
        ticks = [style.label(names[order[rank]], 14) for rank in starts]
    else:
        ticks = [f"{rank + 1:,}" for rank in starts[::step]]
    figure = style.figure(
        coloraxis={"cmin": 0, "cmax": 100, "colorbar": style.top_colourbar("share of the true class (%)")}
    )
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
        return f"{style.label(names[0])} (rank {ranks[0] + 1})"
    return f"ranks {ranks[0] + 1:,}–{ranks[-1] + 1:,} ({style.label(names[0], 24)} … {style.label(names[-1], 24)})"
