"""The loss and its gradients one number at a time, written from the equations: shares no code with rcl_fast.

De Alvis et al., eq. 3-6 and section 3.3.2, with keys beside the anchors and the prototypes. Python's floats throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

Row = list[float]


class Problem(NamedTuple):
    """What the loss is of. Every entry of `key_labels` is the class of a row of `keys`."""

    anchors: list[Row]
    labels: list[int]
    keys: list[Row]
    key_labels: list[int]
    prototypes: list[Row]  # a row for each class, or none
    class_counts: list[float] | None  # None: no rebalancing
    compression: list[float] | None
    temperature: float
    class_average: bool
    normalize: bool
    anchors_are_keys: bool


class Answer(NamedTuple):
    losses: list[float]  # 0 without a positive
    positives: list[int]
    gradients: tuple[list[Row], list[Row], list[Row]]  # of Σ_i weight_i ℓ_i by anchors, keys and prototypes


def solve(problem: Problem, weights: list[float] | None = None) -> Answer:
    """The weights are 1 over the number of anchors that have a positive, where none are given: the mean's."""
    rows = problem.anchors + problem.keys + problem.prototypes
    classes = problem.labels + problem.key_labels + list(range(len(problem.prototypes)))
    N = len(problem.anchors)
    transformed = [_transformed(problem, row, j) for row, j in zip(rows, classes, strict=True)]
    positives = [len(_positives(problem, classes, i)) for i in range(N)]
    if weights is None:
        weights = [1 / max(1, sum(count > 0 for count in positives))] * N
    losses, by_transformed = [], [[0.0] * len(row) for row in rows]
    for i in range(N):
        loss, by_similarity = _loss(problem, transformed, classes, i)
        losses.append(loss)
        for k, slope in by_similarity.items():
            share = weights[i] * slope / problem.temperature
            for d in range(len(rows[i])):
                by_transformed[i][d] += share * transformed[k][d]
                by_transformed[k][d] += share * transformed[i][d]
    by_rows = [
        _through_the_transformation(problem, row, j, slope)
        for row, j, slope in zip(rows, classes, by_transformed, strict=True)
    ]
    last = N + len(problem.keys)
    return Answer(losses, positives, (by_rows[:N], by_rows[N:last], by_rows[last:]))


def _keys_of(problem: Problem, classes: list[int], i: int) -> list[int]:
    first = 0 if problem.anchors_are_keys else len(problem.anchors)
    return [k for k in range(first, len(classes)) if k != i]


def _positives(problem: Problem, classes: list[int], i: int) -> list[int]:
    return [k for k in _keys_of(problem, classes, i) if classes[k] == classes[i]]


def _loss(problem: Problem, transformed: list[Row], classes: list[int], i: int) -> tuple[float, dict[int, float]]:
    """ℓ_i, and its slope by each s_ik."""
    keys, positives = _keys_of(problem, classes, i), _positives(problem, classes, i)
    if not positives:
        return 0.0, {}
    similarity, weighted = {}, {}
    for k in keys:
        product = 0.0
        for a, b in zip(transformed[i], transformed[k], strict=True):
            product += a * b
        similarity[k] = product / problem.temperature
        factor = 1.0
        if problem.class_counts is not None:
            factor *= problem.class_counts[classes[k]]
        if problem.class_average:
            factor /= sum(classes[other] == classes[k] for other in keys)
        weighted[k] = factor * math.exp(similarity[k])
    total = sum(weighted.values())
    mean = sum(similarity[p] for p in positives) / len(positives)
    loss = math.log(total) - mean
    if problem.class_counts is not None:
        loss -= math.log(problem.class_counts[classes[i]])
    slopes = {k: weighted[k] / total - (k in positives) / len(positives) for k in keys}
    return loss, slopes


def _transformed(problem: Problem, row: Row, j: int) -> Row:
    length = math.sqrt(sum(number * number for number in row)) if problem.normalize else 1.0
    factor = 1.0 if problem.compression is None else problem.compression[j]
    return [factor * number / length for number in row]


def _through_the_transformation(problem: Problem, row: Row, j: int, slope: Row) -> Row:
    factor = 1.0 if problem.compression is None else problem.compression[j]
    if not problem.normalize:
        return [factor * number for number in slope]
    length = math.sqrt(sum(number * number for number in row))
    along = sum(number * by / length for number, by in zip(row, slope, strict=True))
    return [factor * (by - along * number / length) / length for number, by in zip(row, slope, strict=True)]
