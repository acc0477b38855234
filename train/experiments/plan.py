"""The runs that a table needs, which of them are missing, and running these."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments import job_queue, runs
from rcl_fast.train.experiments.job_queue import Failure, Job, without_job
from rcl_fast.train.experiments.rows import row_of
from rcl_fast.train.experiments.runs import Run
from rcl_fast.train.experiments.setting import Setting
from rcl_fast.train.experiments.tables import Column, Row, Table
from rcl_fast.train.options import ReproduceOptions
from rcl_fast.train.rundir import result_files
from rcl_fast.train.runtime.wording import counted

_logger = logging.getLogger(__name__)


class PlannedRun(NamedTuple):
    """The source of one figure of a table: a training, or a second stage on it."""

    run: Run
    second_stage: str | None

    @property
    def id(self) -> tuple[str, str | None]:
        return self.run.id, self.second_stage

    @property
    def label(self) -> str:
        return self.run.label + (f", {self.second_stage}" if self.second_stage else "")


Plan = list[list[list[PlannedRun]]]
"""The planned runs by row, column and seed."""
Rows = dict[tuple[str, str | None], dict[str, Any]]


def plan(table: Table, setting: Setting, options: ReproduceOptions) -> Plan:
    """Returns the runs that each cell needs."""

    def cell(row: Row, column: Column) -> list[PlannedRun]:
        seeds = runs.runs_of(row, column, setting, range(options.seeds), options.folder, options.data)
        return [PlannedRun(run, row.second_stage) for run in seeds]

    return [[cell(row, column) for column in table.columns] for row in table.rows]


def unique(entries: Plan) -> Iterator[PlannedRun]:
    """Gives each planned run once, seed by seed: the first seed of all rows comes first, in the table's order."""
    by_id = {entry.id: entry for row in entries for cell in row for entry in cell}
    yield from sorted(by_id.values(), key=lambda entry: entry.run.config.run.seed)


def read_rows(files: Sequence[Path]) -> Rows:
    """Reads rows by run id and second stage. Raises UserError for a file that is not one of rows, with the line."""
    rows: Rows = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"--rows {file}: there is no such file")
        try:
            for number, row in enumerate(result_files.read_rows(file), start=1):
                if not _is_row(row):
                    raise UserError(f"line {number} has no key and second_stage")
                rows[row["key"], row["second_stage"]] = row
        except UserError as error:
            raise UserError(f"--rows {file}: no file of rows ({error}); mend that line or take it out") from error
    return rows


def kept_rows(file: Path) -> Rows:
    """Returns the rows that an earlier call wrote, if any; a file with a damaged line is kept under another name."""
    rows: Rows = {}
    damaged = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if _is_row(row) and isinstance(row.get("seed"), int):
            rows[row["key"], row["second_stage"]] = row
        else:
            damaged.append(str(number))
    if damaged:
        aside = file.with_name(file.name + ".damaged")
        os.replace(file, aside)
        _logger.warning(f"{file} is damaged in line {', '.join(damaged)}: kept as {aside}; its other rows stay")
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("second_stage", 0), str | None)
    )


def why_unusable(entry: PlannedRun) -> str | None:
    """Returns why what lies in the folder of a planned run can't be used, and what to do; None where it can."""
    try:
        row_of(entry.run, entry.second_stage)
    except UserError as error:
        return str(error)
    return None


def unusable(entries: Plan, known: Rows) -> list[Failure]:
    """Returns the planned runs with a damaged file in their folder, or with those of another run; each folder once."""
    failures: dict[str, Failure] = {}
    for entry in unique(entries):
        why = None if entry.id in known else why_unusable(entry)
        if why is not None:
            failures.setdefault(why, without_job(entry.label, entry.run.folder, why))
    return list(failures.values())


def missing_runs(entries: Plan, known: Rows) -> list[Run]:
    """Returns the trainings to start or to finish; a second stage whose row is known needs none."""
    needed = {entry.run.id: entry.run for entry in unique(entries) if entry.id not in known}
    to_do = ("missing", "half done")
    return [run for run in needed.values() if (run.id, None) not in known and runs.state(run) in to_do]


def missing_stages(entries: Plan, known: Rows) -> list[PlannedRun]:
    return [
        entry
        for entry in unique(entries)
        if entry.second_stage is not None
        and entry.id not in known
        and not (runs.second_stage_folder(entry.run, entry.second_stage) / result_files.METRICS).is_file()
    ]


def dry(entries: Plan, known: Rows, processes: int) -> list[str]:
    """Returns the commands of all missing runs, in order."""
    trainings = [shlex.join(runs.command(run, processes)) for run in missing_runs(entries, known)]
    stages = [
        shlex.join(runs.second_stage_command(entry.run, entry.second_stage))
        for entry in missing_stages(entries, known)
        if entry.second_stage is not None
    ]
    return trainings + stages


def run_missing(entries: Plan, known: Rows, options: ReproduceOptions) -> list[Failure]:
    """Runs the missing trainings, then the second stages on them. Raises job_queue.Stopped."""
    wanted = {entry.run.id: entry.run for entry in unique(entries)}
    mine = part_of(list(wanted), options.part)
    missing = [run for run in missing_runs(entries, known) if run.id in mine]
    half_done = sum(runs.state(run) == "half done" for run in missing)
    damaged = sum((id, None) not in known and runs.state(wanted[id]) == "unusable" for id in mine)
    done = len(mine) - len(missing) - damaged
    _logger.info(
        f"{counted(mine, 'run')}: {done} done, {half_done} half done, {len(missing) - half_done} to start"
        + f", {damaged} damaged" * (damaged > 0)
    )
    for run in missing:
        runs.check_data(run.config, run.data)
    failures = _run_all([_training(run, options.gpus_per_run) for run in missing], options)
    stages = [entry for entry in missing_stages(entries, known) if entry.run.id in mine]
    trained = [entry for entry in stages if runs.state(entry.run) == "finished"]
    failures += [
        Failure(_stage(entry), "of its training only the row is here (--rows), not the folder with the checkpoint")
        for entry in stages
        if entry not in trained and (entry.run.id, None) in known
    ]
    return failures + _run_all([_stage(entry) for entry in trained], options)


def _run_all(jobs: Sequence[Job], options: ReproduceOptions) -> list[Failure]:
    slots = job_queue.find_slots(options.devices, options.jobs_per_device, options.gpus_per_run)
    return job_queue.run_all(jobs, slots, len(jobs))


def part_of(ids: list[str], part: str) -> list[str]:
    """Returns one part of all runs, finished or not: the jobs of an array start at different times, and must agree."""
    index, count = map(int, part.split("/"))
    return ids[index - 1 :: count]


def _training(run: Run, processes: int) -> Job:
    return Job(run.label, runs.command(run, processes), run.folder, run.config.optimization.epochs)


def _stage(entry: PlannedRun) -> Job:
    assert entry.second_stage is not None
    folder = runs.second_stage_folder(entry.run, entry.second_stage)
    return Job(entry.label, runs.second_stage_command(entry.run, entry.second_stage), folder, epochs=0)
