"""Showing a table: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from rcl_fast.train.experiments.cells import Cell, Spread
from rcl_fast.train.experiments.tables import METRICS, Column, Paper, Row, Table, heading
from rcl_fast.train.runtime.wording import counted


class Filled(NamedTuple):
    """A table and its cells."""

    table: Table
    cells: list[list[Cell]]  # by row and column
    without: list[list[str]]  # by row and column: the text of a cell without a figure of ours
    setting: list[str]  # the differences from the paper's setting
    seeds: int
    selected_on: list[str]  # the sets that epochs were selected on


def title(filled: Filled) -> str:
    mark = f" · NOT THE PAPER'S SETTING: {', '.join(filled.setting)}" if filled.setting else ""
    return filled.table.title + mark


def notes(filled: Filled) -> list[str]:
    """Returns sentences on what the figures are."""
    spread = "mean ± standard deviation over" if filled.seeds > 1 else "of"
    lines = [f"Ours: {spread} {counted(range(filled.seeds), 'seed')}, the selected epoch, then the last."]
    if not filled.setting and _has_paper(filled):
        lines.append("In brackets: ours minus the paper's.")
    if filled.selected_on:
        lines.append(f"Epochs selected on: {'; '.join(filled.selected_on)}.")
    else:
        lines.append("No run of ours is finished yet.")
    return lines + [note for note in filled.table.notes if not (filled.setting and note.startswith("The best epoch"))]


def for_terminal(filled: Filled) -> RichTable:
    """Returns the table without title and notes, which rich would fold to the table's width."""
    table = RichTable()
    table.add_column("")
    for column in filled.table.columns:
        if _has_paper(filled):
            table.add_column(f"{heading(column)}\npaper", justify="right")
            table.add_column("\n\nours", justify="right")
        else:
            table.add_column(heading(column), justify="right")
    for row, texts in _texts(filled):
        if texts is None:
            table.add_section()
            table.add_row(f"[bold]{row.block}[/bold]")
        else:
            table.add_row(row.label, *texts)
    return table


def as_markdown(filled: Filled) -> str:
    """Returns the table in GitHub's Markdown, with a line of its own for each block of rows."""
    head = [""]
    for column in filled.table.columns:
        name = heading(column).replace("\n", ", ")
        head += [f"{name}: paper", "ours"] if _has_paper(filled) else [name]
    lines = [f"**{title(filled)}**", "", _line(head), "|---" * len(head) + "|"]
    for row, texts in _texts(filled):
        if texts is None:
            lines.append(_line([f"*{row.block}*", *[""] * (len(head) - 1)]))
        else:
            lines.append(_line([row.label, *(text.replace("\n", "<br>") for text in texts)]))
    return "\n".join([*lines, "", *notes(filled)]) + "\n"


def as_json(filled: Filled) -> dict[str, Any]:
    return {
        "table": filled.table.name,
        "title": title(filled),
        "not_the_papers_setting": filled.setting,
        "seeds": filled.seeds,
        "columns": [{**column.options, "metric": column.metric} for column in filled.table.columns],
        "rows": [
            {"row": row.label, "block": row.block, "features": row.features, "cells": [_values(c) for c in cells]}
            for row, cells in zip(filled.table.rows, filled.cells, strict=True)
        ],
        "notes": notes(filled),
    }


def _has_paper(filled: Filled) -> bool:
    """Returns whether the table has numbers of the paper: for a data set in place of the paper's there are none."""
    return any(row.paper for row in filled.table.rows)


def _values(cell: Cell) -> dict[str, Any]:
    spreads = {name: None if of is None else of._asdict() for name, of in (("best", cell.best), ("last", cell.last))}
    return {"paper": cell.paper, **spreads, "off": cell.off, "last_off": cell.last_off}


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _texts(filled: Filled) -> list[tuple[Row, list[str] | None]]:
    """Returns each row with its cells as text, the paper's and ours in turn.

    The first row of each block comes before that with None, for the block's heading.
    """
    lines: list[tuple[Row, list[str] | None]] = []
    block = ""
    for row, cells, without_figure in zip(filled.table.rows, filled.cells, filled.without, strict=True):
        if row.block != block:
            block = row.block
            lines.append((row, None))
        texts = []
        for cell, column, without in zip(cells, filled.table.columns, without_figure, strict=True):
            texts += [_paper(cell.paper, column)] if _has_paper(filled) else []
            texts.append(_ours(cell, column, filled.seeds, without))
        lines.append((row, texts))
    return lines


def _paper(value: Paper, column: Column) -> str:
    if value is None:
        return "not in our sources"
    return value if isinstance(value, str) else f"{value:,.{METRICS[column.metric].digits}f}"


def _ours(cell: Cell, column: Column, seeds: int, without: str) -> str:
    if cell.best is None:
        return "–" if cell.runs else without
    best = _spread(cell.best, column, cell.off)
    if cell.best.seeds < seeds:
        best += f", {cell.best.seeds} of {seeds} seeds"
    return best if cell.last is None else f"{best}\nlast {_spread(cell.last, column, cell.last_off)}"


def _spread(of: Spread, column: Column, off: float | None) -> str:
    digits = METRICS[column.metric].digits
    deviation = "" if of.deviation is None else f" ± {of.deviation:,.{digits}f}"
    return f"{of.mean:,.{digits}f}{deviation}" + ("" if off is None else f" ({off:+,.{digits}f})")
