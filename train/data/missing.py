"""The one message for data that is not there: what was looked for, where, and how to get it."""

from collections.abc import Sequence
from pathlib import Path


def missing_data(name: str, data: Path | None, expected: Sequence[str], how: str) -> FileNotFoundError:
    """The error to raise: data set `name` lacks the paths `expected` below `data`; `how` says how to get them."""
    where = f"not found below {data}" if data is not None else "no data folder was given; --data DIR should hold"
    return FileNotFoundError("\n".join([f"{name}: {where}:", *(f"  {path}" for path in expected), how]))
