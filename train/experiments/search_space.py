"""What --grid spans: options of train/run.py, each with its values or its range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rcl_fast.train.errors import UserError


class Values(NamedTuple):
    """The values that an option may have."""

    values: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.values)


class Range(NamedTuple):
    """The numbers that an option may have, from low to high."""

    low: float
    high: float
    log: bool

    def __str__(self) -> str:
        return f"{self.low!r}..{self.high!r}" + ":log" * self.log


Space = dict[str, Values | Range]


def parse_space(items: Sequence[str], *, ranges: bool) -> Space:
    """Returns the space of items like tau=1.0,1.3 or, with `ranges`, lr=0.01..1:log.

    Raises:
        UserError: an item that is none, an option that is there twice, a range that can't be, no item at all.
    """
    space: Space = {}
    for item in items:
        name, _, values = item.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not name or not values or "" in values.split(","):
            raise UserError(f"--grid {item}: expected an option of train/run.py and its values, like tau=1.0,1.3")
        if name in space:
            raise UserError(f"--grid {item}: {name} is there twice")
        is_range = ".." in values
        if is_range and not ranges:
            raise UserError(f"--grid {item}: a range is for --sampler tpe; a grid has values, like tau=1.0,1.3")
        space[name] = _range(item, values) if is_range else Values(tuple(dict.fromkeys(values.split(","))))
    if not space:
        raise UserError("--grid needs at least one option, like tau=1.0,1.3,1.5")
    return space


def _range(item: str, values: str) -> Range:
    bounds, _, scale = values.partition(":")
    low, _, high = bounds.partition("..")
    try:
        found = Range(float(low), float(high), scale == "log")
    except ValueError as error:
        raise UserError(f"--grid {item}: {error}; a range is LOW..HIGH or LOW..HIGH:log") from error
    if scale not in ("", "log"):
        raise UserError(f"--grid {item}: {scale!r} is no scale; there is log")
    bounded = math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high
    if not bounded or (found.log and found.low <= 0):
        raise UserError(f"--grid {item}: a range is LOW..HIGH with finite LOW below HIGH, and above 0 where it is :log")
    return found


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Gives every combination of the values, the last option's changing first."""
    choices = [of.values for of in space.values() if isinstance(of, Values)]
    for point in itertools.product(*choices):
        yield dict(zip(space, point, strict=True))


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """Gives points that have, between them, every value and both ends of every range."""
    ends = {name: list(of.values) if isinstance(of, Values) else [of.low, of.high] for name, of in space.items()}
    first = {name: values[0] for name, values in ends.items()}
    for name, values in ends.items():
        yield from ({**first, name: value} for value in values)
