"""Words for messages: how many there are, and the first few of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from numpy.typing import NDArray

SHOWN = 5
"""Things of a kind that a message names."""


def some(names: Sequence[object] | NDArray[Any]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def first_lines(lines: Sequence[str]) -> list[str]:
    """Returns the first lines, and one that says how many more there are."""
    more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def counted(things: Collection[object], one: str, many: str | None = None) -> str:
    """Returns how many things there are, with their word; its plural has an s, unless `many` is another one."""
    return f"{len(things):,} {one if len(things) == 1 else many or f'{one}s'}"
