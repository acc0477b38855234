"""Reproducing one of the paper's tables: missing runs are run, and our numbers shown beside the paper's."""

from __future__ import annotations

import logging
import shlex

from rcl_fast.train.errors import UserError, refuse
from rcl_fast.train.experiments import pictures
from rcl_fast.train.experiments.job_queue import Failure
from rcl_fast.train.experiments.plan import dry, plan, read_rows, run_missing
from rcl_fast.train.experiments.setting import Setting, adapt
from rcl_fast.train.experiments.show import show
from rcl_fast.train.experiments.tables import TABLES, Table
from rcl_fast.train.options import ReproduceOptions

_logger = logging.getLogger(__name__)


def reproduce(table: Table, options: ReproduceOptions) -> list[Failure]:
    """Runs the missing runs of a table, shows the table and writes it; returns the runs that failed.

    Raises:
        UserError: options that can't be, before anything runs.
        job_queue.Stopped: a signal came; the same call goes on.
    """
    _check(options)
    setting = Setting(options.dataset, options.epochs, options.validate_on, tuple(shlex.split(options.more)))
    entries = plan(table, setting, options)
    known = read_rows(options.rows)
    if options.dry_run:
        for line in dry(entries, known, options.gpus_per_run):
            print(line)
        return []
    if table.name == "figure3":
        pictures.check_drawable()
    failures = run_missing(entries, known, options) if options.run else []
    if options.part != "1/1":
        _logger.info(f"part {options.part} is done; run the command without --part to show the table")
    else:
        show(table, entries, known, setting, options)
    return failures


def table_of(name: str, options: ReproduceOptions) -> Table:
    """Returns the table of that name, on the data set asked for. Raises UserError for a row that it doesn't have."""
    table = adapt(TABLES[name], options.dataset)
    labels = list(dict.fromkeys(row.label for row in table.rows))
    unknown = [label for label in options.only if label not in labels]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: {table.name} has no such row; it has {', '.join(map(repr, labels))}")
    return table._replace(rows=tuple(row for row in table.rows if not options.only or row.label in options.only))


def _check(options: ReproduceOptions) -> None:
    index, _, count = options.part.partition("/")
    is_part = index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
    refuse(
        {
            f"--seeds must be at least 1, got {options.seeds}": options.seeds < 1,
            f"--jobs-per-device must be at least 1, got {options.jobs_per_device}": options.jobs_per_device < 1,
            f"--gpus-per-run must be at least 1, got {options.gpus_per_run}": options.gpus_per_run < 1,
            f"--part is I/N with 1 <= I <= N, like 2/8; got {options.part}": not is_part,
        }
    )
