"""From the rows of runs to the cells of a table: means over seeds, and how far they are from the paper's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rcl_fast.train.experiments.tables import METRICS, Column, Paper, Row


class Spread(NamedTuple):
    """Over the seeds of one row, in the units of the table; one seed has no deviation."""

    mean: float
    deviation: float | None
    seeds: int


class Cell(NamedTuple):
    """What stands in one row and column."""

    paper: Paper
    runs: int  # that are finished, whether or not they have this figure
    best: Spread | None  # of the epoch selected on the validation set
    last: Spread | None
    off: float | None  # ours minus the paper's, best epoch
    last_off: float | None


def cell(row: Row, column: Column, place: int, found: Sequence[dict[str, Any]], in_papers_setting: bool) -> Cell:
    """The cell of column number `place`, from the rows of its finished runs.

    Only in the paper's setting is a difference from its number one of reproduction.
    """
    name = row.features + column.metric
    best, last = (spread([of.get(prefix + name) for of in found], column.metric) for prefix in ("", "last_epoch_"))
    paper = row.paper[place] if row.paper else "–"
    off, last_off = (_off(ours, paper) if in_papers_setting else None for ours in (best, last))
    return Cell(paper, len(found), best, last, off, last_off)


def spread(values: Sequence[float | None], metric: str) -> Spread | None:
    """Mean and standard deviation (of a sample, n − 1) of the values there are; None without any."""
    known = [METRICS[metric].scale * value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def _off(ours: Spread | None, paper: Paper) -> float | None:
    return ours.mean - paper if ours is not None and isinstance(paper, int | float) else None
