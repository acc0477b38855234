"""Shared parts of the report's figures: colours, texts of numbers, panels."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from rcl_fast.metrics import FEW_BELOW, MANY_ABOVE

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
RANK_SCALE = [[0.0, BLUE], [0.4, SKY], [0.6, ORANGE], [1.0, VERMILLION]]
GRID = "rgba(128, 128, 128, 0.22)"

NAMED_TICKS = 30  # more class names than this do not fit an axis


class Group(NamedTuple):
    """The classes with similar numbers of training images, by the literature's bounds."""

    name: str
    images: str
    colour: str
    members: NDArray[np.bool_]


class Panel(NamedTuple):
    """A figure under its title and text; without a figure, the text says why there is none."""

    title: str
    text: str
    figure: go.Figure | None


def number(value: Any) -> float:
    """Returns `value` as a float; NaN for None, infinities and whatever is not a number."""
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return math.nan
    return as_float if math.isfinite(as_float) else math.nan


def formatted(value: Any, pattern: str) -> str:
    as_float = number(value)
    return "–" if math.isnan(as_float) else pattern.format(as_float)


def percent(fraction: Any) -> str:
    return formatted(100 * number(fraction), "{:.1f} %")


def plural(count: float, noun: str, nouns: str | None = None) -> str:
    """Returns `count` things in words: "no class", "1 class", "1,200 classes"."""
    if count == 0:
        return f"no {noun}"
    return f"{count:,.0f} {noun if count == 1 else nouns or noun + 's'}"


def by_count(counts: Sequence[int]) -> NDArray[np.intp]:
    """Returns the classes [C] from most to fewest training images."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def groups(counts: Sequence[int]) -> list[Group]:
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


def label(name: str, width: int | None = None) -> str:
    """Returns a class name that plotly shows as it is: plotly reads a few HTML tags and entities in any text."""
    return html.escape(name if width is None or len(name) <= width else name[: width - 1] + "…", quote=False)


def figure(**layout: Any) -> go.Figure:
    return styled(go.Figure(), **layout)


def styled(figure: go.Figure, **layout: Any) -> go.Figure:
    """Gives a figure the look that all share; the page sets fonts and the colours of light and dark pages."""
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


def absent(what: str) -> str:
    return f"No figure: the run recorded no {what}."


def top_colourbar(title: str) -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 8,
        "x": 0.5,
        "y": 1.02,
        "yanchor": "bottom",
        "title": {"text": title, "side": "top", "font_size": 13},
        "outlinewidth": 0,
    }
