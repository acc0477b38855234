"""The report's figures of confidence: reliability diagram and histogram."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rcl_fast.metrics import expected_calibration_error
from rcl_fast.train.report import style
from rcl_fast.train.report.style import BLUE, GREY, GRID, SKY, VERMILLION, Panel


def reliability_diagram(bins: NDArray[np.floating] | None) -> Panel:
    """Draws accuracy against confidence, from its bins [M, 3] (Guo et al., ICML 2017, figure 1)."""
    title = "Reliability"
    if bins is None or not bins[:, 0].any():
        return Panel(title, style.absent("confidence of a test image"), None)
    images, confidences, right = bins.T
    width = 100 / len(bins)
    accuracy, confidence = (
        np.divide(100 * sums, images, out=np.full(len(bins), np.nan), where=images > 0) for sums in (right, confidences)
    )
    points = {"customdata": np.stack([images, confidence], axis=1), "hovertemplate": _OF_BIN}
    figure = style.figure()
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
    style.styled(figure, bargap=0, xaxis_title_text="confidence (%)", yaxis_title_text="accuracy (%)")
    figure.update_xaxes(range=[0, 100])
    figure.update_yaxes(range=[0, 102])
    error = expected_calibration_error(torch.from_numpy(bins))
    gap = (confidences.sum() - right.sum()) / images.sum()
    too = "over" if gap > 0 else "under"
    text = (
        f"ECE {style.percent(error)}: how far accuracy lies from confidence, on average over the test images, in "
        f"{len(bins)} bins of equal width. On the whole the network is {too}confident, by "
        f"{style.percent(abs(gap))}. The confidence is the largest softmax of the raw logits, which the classes are "
        "chosen by, without any adjustment or temperature."
    )
    return Panel(title, text, figure)


_OF_BIN = "%{y:.1f} % right<br>mean confidence %{customdata[1]:.1f} %<br>%{customdata[0]:,} test images<extra></extra>"


def confidence_histogram(bins: NDArray[np.floating] | None) -> Panel:
    """Draws the share of the test images in each bin [M, 3] of the reliability diagram."""
    title = "Confidence"
    if bins is None or not bins[:, 0].any():
        return Panel(title, style.absent("confidence of a test image"), None)
    width = 100 / len(bins)
    images = bins[:, 0]
    figure = style.figure(bargap=0, xaxis_title_text="confidence (%)", yaxis_title_text="test images (%)")
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
