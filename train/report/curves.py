"""The report's curves over epochs."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from rcl_fast.train.report import style
from rcl_fast.train.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, Panel


def _column(history: list[dict[str, float]], key: str) -> NDArray[np.float64]:
    return np.array([style.number(row.get(key)) for row in history])


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
    """Draws those of the curves that the history holds, over epochs; returns None where it holds none.

    `label`: where these curves leave room for the best epoch's label.
    """
    figure = style.figure(hovermode="x unified", xaxis_title_text="epoch", yaxis_title_text=axis)
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


def accuracy_curves(history: list[dict[str, float]], best_epoch: float, selected_on: str | None) -> Panel:
    """Draws balanced accuracy, harmonic mean and the groups' accuracies, in percent."""
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
    return Panel("Accuracy", f"After each epoch{chosen}." if figure else style.absent("accuracy of an epoch"), figure)


def loss_curves(history: list[dict[str, float]], best_epoch: float) -> Panel:
    """Draws the loss that is minimised, and its two parts."""
    curves = [
        Curve("loss", "total", PURPLE),
        Curve("cross_entropy", "cross-entropy", SKY),
        Curve("contrastive", "contrastive", ORANGE, "dash"),
    ]
    figure = _curves(history, curves, best_epoch, axis="loss (nats)", hover="%{y:.4f}", label="top")
    text = "Mean over the training batches of each epoch; the total weighs the two parts."
    return Panel("Training loss", text if figure else style.absent("loss"), figure)


def learning_rate_curve(history: list[dict[str, float]], best_epoch: float) -> Panel:
    """Draws the learning rate of each epoch."""
    curves = [Curve("learning_rate", "learning rate", GREY)]
    figure = _curves(history, curves, best_epoch, axis="learning rate", hover="%{y:.5g}", label="middle")
    if figure:
        figure.update_yaxes(rangemode="tozero")
    return Panel(
        "Learning rate", "The schedule as it was followed." if figure else style.absent("learning rate"), figure
    )
