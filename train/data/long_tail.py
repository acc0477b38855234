"""Long-tailed class counts, and which samples make them up: pure functions of labels."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcl_fast.train.errors import UserError

ImbalanceShape = Literal["exponential", "step"]


def long_tailed_counts(
    n_max: int, num_classes: int, imbalance: float, shape: ImbalanceShape = "exponential"
) -> NDArray[np.int64]:
    """Returns the number of samples of each class, int64 [num_classes]: `n_max` first, `n_max / imbalance` last.

    "exponential" falls by the same factor from class to class, "step" has two levels: the first half of the
    classes and the rest. Every class keeps at least one sample. Raises ValueError for impossible arguments.
    """
    if n_max < 1 or num_classes < 1:
        raise UserError(f"a long tail needs n_max >= 1 and num_classes >= 1, not {n_max} and {num_classes}")
    if not 1 <= imbalance < np.inf:
        raise UserError(f"the imbalance factor is the largest class over the smallest, >= 1, not {imbalance}")
    if shape == "exponential":
        counts = n_max / imbalance ** (np.arange(num_classes) / max(num_classes - 1, 1))
    elif shape == "step":
        head = max(num_classes // 2, 1)
        counts = np.where(np.arange(num_classes) < head, n_max, n_max / imbalance)
    else:
        raise UserError(f'the shape of the imbalance is "exponential" or "step", not {shape!r}')
    return np.maximum(counts.astype(np.int64), 1)


def first_of_each_class(labels: ArrayLike, counts: ArrayLike) -> NDArray[np.int64]:
    """Returns the indices, ascending, of the first `counts[k]` samples of each class k.

    So a smaller set is a part of each larger one. `labels`: integer [n], all below len(counts). Raises ValueError
    where a class has too few samples.
    """
    labels, counts = np.asarray(labels, np.int64), np.asarray(counts, np.int64)
    available = np.bincount(labels, minlength=len(counts))
    short = np.flatnonzero(available < counts)
    if len(short):
        k = short[0]
        raise UserError(
            f"{len(short)} of {len(counts)} classes have too few samples: "
            f"class {k} has {available[k]} and {counts[k]} are needed"
        )
    return np.flatnonzero(_rank_in_class(labels, np.arange(len(labels))) < counts[labels])


def held_out(labels: ArrayLike, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the ascending indices of a stratified split (training, validation); `fraction` of each class is held out.

    A class of two or more samples gives at least one to validation; the last sample of a class stays in training.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction held out for validation lies between 0 and 1, not {fraction}")
    labels = np.asarray(labels, np.int64)
    sizes = np.bincount(labels)
    counts = np.minimum(np.maximum(np.rint(fraction * sizes), 1), sizes - 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    out = _rank_in_class(labels, order) < counts[labels]
    return np.flatnonzero(~out), np.flatnonzero(out)


def _rank_in_class(labels: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for each sample how many of its class come before it in `order`, int64 [n]."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    ranks = np.empty(len(labels), np.int64)
    ranks[by_class] = np.arange(len(labels)) - first
    return ranks
