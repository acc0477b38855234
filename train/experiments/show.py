"""Printing a table from the rows of its runs, and writing it as Markdown, JSON and rows."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.experiments import cells, clusters, pictures, render, runs
from rcl_fast.train.experiments.job_queue import Failure, without_job
from rcl_fast.train.experiments.plan import Plan, PlannedRun, Rows, kept_rows, plan, unique, why_unusable
from rcl_fast.train.experiments.render import Filled
from rcl_fast.train.experiments.rows import CLUSTERS, row_of
from rcl_fast.train.experiments.setting import Setting
from rcl_fast.train.experiments.tables import TABLES, Row, Table
from rcl_fast.train.options import ReproduceOptions
from rcl_fast.train.runtime.console import print_table
from rcl_fast.train.runtime.files import write_text

_logger = logging.getLogger(__name__)


def show(table: Table, entries: Plan, known: Rows, setting: Setting, options: ReproduceOptions) -> list[Failure]:
    """Gathers the rows of the runs, prints the table, and writes TABLE.md, TABLE.json and the rows as TABLE.jsonl.

    Returns the runs whose features could not be computed, and why.
    """
    failures = _measure_clusters(entries, known) if any(row.features for row in table.rows) else []
    finished = {entry.id: row for entry in unique(entries) if (row := _row(entry, known)) is not None}
    filled = fill(table, entries, finished, setting, options.seeds)
    _logger.info(render.title(filled))
    print_table(render.for_terminal(filled))
    _logger.info("\n".join(render.notes(filled)))
    folder = options.output or options.folder / "tables"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotWritten(f"--output {folder}: the table can't be written there ({error})") from error
    file = folder / file_name(table, setting, options.only)
    write_text(file.with_name(file.name + ".md"), render.as_markdown(filled))
    write_text(file.with_name(file.name + ".json"), json.dumps(render.as_json(filled), indent=2) + "\n")
    rows = {id: {"not_the_papers_setting": filled.setting, **row} for id, row in finished.items()}
    kept = other_seeds(file.with_name(file.name + ".jsonl"), table, setting, options)
    lines = [json.dumps(row) + "\n" for row in {**kept, **rows}.values()]
    write_text(file.with_name(file.name + ".jsonl"), "".join(lines))
    _logger.info(f"written: {file}.md, .json and .jsonl")
    if table.name == "figure3":
        failures += _draw(table, entries, render.title(filled), file)
    return failures


def file_name(table: Table, setting: Setting, only: Sequence[str]) -> str:
    """Returns the table's file name. Another setting than the paper's has its own, and so has a part of the table."""
    changed = {"epochs": f"{setting.epochs}epochs", "validate_on": f"on_{setting.validate_on}", "more": "more"}
    parts = [text for name, text in changed.items() if setting.changes(table, name)]
    return "-".join([table.name, *([setting.dataset] if setting.dataset else []), *parts, *(["only"] if only else [])])


def other_seeds(file: Path, table: Table, setting: Setting, options: ReproduceOptions) -> Rows:
    """Returns the rows in `file` of the table's runs with any seed, so that a call with fewer seeds loses none."""
    before = kept_rows(file)
    seeds = 1 + max((row["seed"] for row in before.values()), default=-1)
    wanted = {entry.id for entry in unique(plan(table, setting, dataclasses.replace(options, seeds=seeds)))}
    return {id: row for id, row in before.items() if id in wanted}


def _row(entry: PlannedRun, known: Rows) -> dict[str, Any] | None:
    if entry.id in known:
        return known[entry.id]
    try:
        return row_of(entry.run, entry.second_stage)
    except UserError:  # `unusable` says why
        return None


def _measure_clusters(entries: Plan, known: Rows) -> list[Failure]:
    failures = []
    for entry in unique(entries):
        measured = (entry.run.folder / CLUSTERS).is_file()
        if entry.id not in known and not measured and runs.state(entry.run) == "finished":
            _logger.info(f"cluster indices: {entry.label}")
            try:
                clusters.measure(entry.run.folder, entry.run.data)
            except UserError as error:
                failures.append(_without_features(entry, error))
    return failures


def _without_features(entry: PlannedRun, error: UserError) -> Failure:
    return without_job(entry.label, entry.run.folder, f"no features of its test images: {error}")


def fill(table: Table, entries: Plan, finished: Rows, setting: Setting, seeds: int) -> Filled:
    """Returns the table's cells, from the rows of its finished runs."""
    words = setting.words(TABLES.get(table.name, table))
    by_row = [
        [
            cells.cell(row, column, place, [finished[entry.id] for entry in cell if entry.id in finished], not words)
            for place, (column, cell) in enumerate(zip(table.columns, of_row, strict=True))
        ]
        for row, of_row in zip(table.rows, entries, strict=True)
    ]
    selected_on = list(dict.fromkeys(row["selected_on"] for row in finished.values() if row["selected_on"]))
    without = [
        [_without_figure(row, [entry for entry in cell if entry.id not in finished]) for cell in of_row]
        for row, of_row in zip(table.rows, entries, strict=True)
    ]
    return Filled(table, by_row, without, words, seeds, selected_on)


def _without_figure(row: Row, unfinished: Sequence[PlannedRun]) -> str:
    if row.options is None:
        return row.without_run
    return "damaged" if any(why_unusable(entry) is not None for entry in unfinished) else "not run"


def _draw(table: Table, entries: Plan, title: str, file: Path) -> list[Failure]:
    """Draws the first seed of each row, side by side; points that the file has already are not computed again."""
    drawn = {row.label: of_row[0][0] for row, of_row in zip(table.rows, entries, strict=True) if of_row[0]}
    known = pictures.read_points(file)
    panels = {}
    for label, entry in drawn.items():
        run, points = entry.run, known.get(label, {})
        if points.get("run") != run.id:
            if runs.state(run) != "finished":
                _logger.info(f"no picture: it needs the checkpoint of {run.label}")
                return []
            try:
                points = {"run": run.id, "seed": run.config.run.seed, **pictures.points_of(run.folder, run.data)}
            except UserError as error:
                return [_without_features(entry, error)]
        panels[label] = points
    for written in pictures.write(panels, title, file):
        _logger.info(f"written: {written}")
    return []
