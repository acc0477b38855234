"""From the rows of runs to the cells of a table: means over seeds, and their differences from the paper's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rcl_fast.train.experiments.tables import METRICS, Column, Paper, Row


class Spread(NamedTuple):
    """Mean and deviation over the seeds of one row, in the units of the table; one seed has no deviation."""

    mean: float
    deviation: float | None
    seeds: int


class Cell(NamedTuple):
    """The content of one row and column."""

    paper: Paper
    runs: int  # how many are finished, whether or not they have this figure
    best: Spread | None  # of the selected epoch
    last: Spread | None
    off: float | None  # ours minus the paper's, best epoch
    last_off: float | None


def cell(row: Row, column: Column, place: int, rows: Sequence[dict[str, Any]], in_papers_setting: bool) -> Cell:
    """Returns the cell of column number `place`, from the rows of its finished runs.

    Outside the paper's setting, a difference from the paper's number means nothing and is left out.
    """
    name = row.features + column.metric
    best, last = (spread([of.get(prefix + name) for of in rows], column.metric) for prefix in ("", "last_epoch_"))
    paper = row.paper[place] if row.paper else "–"
    off, last_off = (_off(ours, paper) if in_papers_setting else None for ours in (best, last))
    return Cell(paper, len(rows), best, last, off, last_off)


def spread(values: Sequence[float | None], metric: str) -> Spread | None:
    """Returns mean and standard deviation (of a sample, n − 1) of the values that are not None; None without any."""
    known = [METRICS[metric].scale * value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def _off(ours: Spread | None, paper: Paper) -> float | None:
    return ours.mean - paper if ours is not None and isinstance(paper, int | float) else None
