"""What --grid spans: options of train/run.py, each with its values or its range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rcl_fast.train.arguments import spellings
from rcl_fast.train.arguments.ranges import count, flag, hints, single
from rcl_fast.train.errors import UserError
from rcl_fast.train.options import Config


class Values(NamedTuple):
    """The values that an option may have."""

    values: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.values)


class Range(NamedTuple):
    """The numbers that an option may have, from low to high; whole ones where these are."""

    low: float
    high: float
    log: bool

    def __str__(self) -> str:
        return f"{self.low!r}..{self.high!r}" + ":log" * self.log


Space = dict[str, Values | Range]


def parse_space(items: Sequence[str], *, ranges: bool) -> Space:
    """Returns the space of items like tau=1.0,1.3 or, with `ranges`, lr=0.01..1:log.

    Raises:
        UserError: an item that is none, an option that there isn't or that is there twice, a range that can't be, no
            item at all.
    """
    space: Space = {}
    for item in items:
        name, _, values = item.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not name or not values or "" in values.split(","):
            raise UserError(f"--grid {item}: expected an option of train/run.py and its values, like tau=1.0,1.3")
        _check_name(item, name)
        if name in space:
            raise UserError(f"--grid {item}: {name} is there twice")
        is_range = ".." in values
        if is_range and not ranges:
            raise UserError(f"--grid {item}: a range is for --sampler tpe; a grid has values, like tau=1.0,1.3")
        space[name] = _range(item, name, values) if is_range else _values(item, name, values)
    if not space:
        raise UserError("--grid needs at least one option, like tau=1.0,1.3,1.5")
    return space


OWN = ("dataset", "data", "output", "resume")
"""The options of train/run.py that are the search's or each trial's own."""


def _check_name(item: str, name: str) -> None:
    known = hints(Config)
    if name in OWN:
        raise UserError(f"--grid {item}: {flag(name)} is the same for all trials, or each trial's own")
    if name not in known:
        meant = spellings.option(name, known)
        hint = f"it is {meant} here" if meant else "train/run.py --help has them all"
        raise UserError(f"--grid {item}: {flag(name)} is no option of train/run.py; {hint}")
    if count(known[name]) != 1:
        raise UserError(f"--grid {item}: {flag(name)} has several values at once, which a search can't vary")


def _values(item: str, name: str, values: str) -> Values:
    found = tuple(dict.fromkeys(values.split(",")))
    if single(hints(Config)[name])[0] is bool and not {value.lower() for value in found} <= {"true", "false"}:
        raise UserError(f"--grid {item}: {flag(name)} is true or false")
    return Values(found)


def _range(item: str, name: str, values: str) -> Range:
    kind, _ = single(hints(Config)[name])
    if kind not in (int, float):
        raise UserError(f"--grid {item}: {flag(name)} is no number and has no range; name its values, with commas")
    bounds, _, scale = values.partition(":")
    low, _, high = bounds.partition("..")
    try:
        found = Range(kind(low), kind(high), scale == "log")
    except ValueError as error:
        numbers = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--grid {item}: a range is LOW..HIGH or LOW..HIGH:log, both {numbers}") from error
    if scale not in ("", "log"):
        raise UserError(f"--grid {item}: {scale!r} is no scale; there is log")
    bounded = math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high
    if not bounded or (found.log and found.low <= 0):
        raise UserError(f"--grid {item}: a range is LOW..HIGH with finite LOW below HIGH, and above 0 where it is :log")
    return found


def size(space: Space) -> int:
    """Returns how many combinations of the values there are."""
    return math.prod(len(of.values) for of in space.values() if isinstance(of, Values))


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
