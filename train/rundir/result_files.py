"""The files of a run's results, read with care, and whether all are there. This module does not import PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rcl_fast.train.errors import UserError
from rcl_fast.train.rundir import checkpoint_files, status

HISTORY = "metrics.jsonl"
"""A row of figures for each epoch."""
METRICS = "metrics.json"
PER_CLASS = "per_class.csv"
REPORT = "report.html"


def read_json(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object, {} where there is no file. Raises UserError, with its name, where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds {content!r:.40}, where an object is expected)")
    return content


def read_metrics(folder: Path) -> dict[str, Any]:
    """Returns the figures of a run or a second stage, {} where there are none. Raises as `read_json`."""
    path = folder / METRICS
    content = read_json(path)
    # It is a number, or None where it is not known.
    if path.exists() and not isinstance(content.get("balanced_accuracy", ""), int | float | None):
        raise UserError(f"{path} is damaged (it has no balanced_accuracy)")
    return content


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns a file's JSON objects, a line each. Raises UserError where it is damaged or not there."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is damaged ({error})") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}, line {number}, is damaged (it holds {line:.40}, where an object is expected)")
    return rows


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each epoch done, at least one. Raises as `read_rows`."""
    rows = read_rows(folder / HISTORY)
    if not rows or not all(isinstance(row.get("balanced_accuracy"), int | float) for row in rows):
        raise UserError(f"{folder / HISTORY} is damaged (it has no balanced_accuracy of each epoch)")
    return rows


def is_finished(folder: Path, epochs: int) -> bool:
    """Returns whether the run there has trained so many epochs, tested and reported. Raises as `read_json`."""
    results = read_metrics(folder)
    tested = results.get("interrupted") is False and results.get("last_epoch") == epochs
    return tested and status.read(folder) == "finished"  # a report may have failed later


def nothing_is_left(folder: Path, epochs: int) -> bool:
    """Returns whether the run is finished, all that it reports is there, and no checkpoint beside it is damaged."""
    try:
        finished = is_finished(folder, epochs) and len(read_history(folder)) == epochs
    except UserError:  # it can be made anew, from the checkpoints
        return False
    checkpoints = [folder / name for name in (checkpoint_files.LAST, checkpoint_files.BEST)]
    return (
        finished
        and all((folder / name).is_file() for name in (PER_CLASS, REPORT))
        and all(checkpoint_files.damage(path) is None for path in checkpoints if path.exists())
    )
