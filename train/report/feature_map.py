"""The report's map of the embeddings, by t-SNE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from rcl_fast.train.report import style
from rcl_fast.train.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RANK_SCALE, SKY, VERMILLION, Panel

CLASS_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, GREY)
CLASS_SYMBOLS = ("circle", "diamond", "x")  # with 7 colours: 21 combinations, for a legend of at most 20 classes
LEGEND_CLASSES = 20
EMBEDDED_POINTS = 2_000
EMBEDDED_MINIMUM = 5


def embedding_map(
    names: list[str],
    counts: Sequence[int],
    embeddings: NDArray[np.floating] | None,
    labels: NDArray[np.integer] | None,
) -> Panel:
    """Draws the features in two dimensions, with a colour for each class; beyond 20 classes it shows their rank."""
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
    order = style.by_count(counts)
    figure = style.figure(legend_itemsizing="constant", margin={"l": 36, "b": 36})
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
            name=style.label(names[index], 14),
            marker={"color": CLASS_COLOURS[rank % len(CLASS_COLOURS)], "symbol": symbol, "size": 5, "opacity": 0.8},
            hovertemplate=f"{style.label(names[index])}<extra></extra>",
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
        hovertext=[style.label(names[index]) for index in labels],
        marker={
            "color": ranks,
            "cmin": 1,
            "cmax": len(order),
            "colorscale": RANK_SCALE,
            "size": 5,
            "opacity": 0.8,
            "colorbar": style.top_colourbar("class, from most to fewest training images"),
        },
        hovertemplate="%{hovertext}<br>rank %{marker.color:,} in training images<extra></extra>",
    )


def balanced_subset(labels: NDArray[np.integer], size: int) -> NDArray[np.intp]:
    """Returns at most `size` indices into `labels`, as evenly over the classes as possible; always the same ones."""
    tie = np.random.default_rng(0).permutation(len(labels))
    by_class = np.lexsort((tie, labels))
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(starts, sizes)  # first each class's first image, then its second
    return np.sort(by_class[np.lexsort((tie[by_class], turn))[:size]])


def tsne(features: NDArray[np.floating]) -> NDArray[np.float64] | None:
    """Maps `features` [n >= 5, D] to two dimensions [n, 2]; returns None where all have the same direction."""
    unit = normalize(features.astype(np.float64))
    if unit.std(axis=0).max() < 1e-9:
        return None
    reduced = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit)
    flat = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))  # t-SNE starts from two components
    perplexity = min(30.0, (len(flat) - 1) / 3)
    with threadpool_limits(1):  # the same picture for any number of cores; training keeps the others busy anyway
        return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat).astype(np.float64)
