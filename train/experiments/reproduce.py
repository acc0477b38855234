"""Reproducing one of the paper's tables: missing runs are run, and our numbers shown beside the paper's."""

from __future__ import annotations

import logging
import os
import shlex

from rcl_fast.train.arguments import parsing, ranges
from rcl_fast.train.arguments.ranges import flag
from rcl_fast.train.checks import check_results_folder
from rcl_fast.train.errors import UserError, refuse
from rcl_fast.train.experiments import pictures
from rcl_fast.train.experiments.devices import check_devices
from rcl_fast.train.experiments.job_queue import Failure, without_job
from rcl_fast.train.experiments.plan import (
    Plan,
    Rows,
    dry,
    missing_runs,
    missing_stages,
    plan,
    read_rows,
    run_missing,
    unique,
    unusable,
)
from rcl_fast.train.experiments.setting import Setting, adapt
from rcl_fast.train.experiments.show import show
from rcl_fast.train.experiments.tables import TABLES, Table
from rcl_fast.train.options import Config, ReproduceOptions

_logger = logging.getLogger(__name__)


def reproduce(table: Table, options: ReproduceOptions) -> list[Failure]:
    """Runs the missing runs of a table, shows the table and writes it; returns the runs that failed.

    Raises:
        UserError: options that can't be, before anything runs.
        job_queue.Stopped: a signal came; the same call goes on.
    """
    _check(options)
    setting = Setting(options.dataset, options.epochs, options.validate_on, _more(options))
    entries = plan(table, setting, options)
    known = read_rows(options.rows)
    if options.dry_run:
        for line in dry(entries, known, options.gpus_per_run):
            print(line)
        return unusable(entries, known)
    if table.name == "figure3":
        pictures.check_drawable()
    failures = unusable(entries, known)
    failures += run_missing(entries, known, options) if options.run else _not_run(entries, known, options)
    if options.part != "1/1":
        _logger.info(f"part {options.part} is done; run the command without --part to show the table")
    else:
        failures += show(table, entries, known, setting, options)
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
    ranges.check(options)
    if options.run:
        check_results_folder("--folder", options.folder, options.data)
    elif os.path.isfile(options.folder):  # one that is only read need not be writable
        raise UserError(f"--folder {options.folder} is a file, not a folder; name another")
    check_results_folder("--output", options.output or options.folder / "tables", options.data)
    check_devices(options.devices)
    index, _, count = options.part.partition("/")
    is_part = index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
    refuse({f"--part is I/N with 1 <= I <= N, like 2/8; got {options.part}": not is_part})


# The options of train/run.py that --more can't have for all runs, and where they come from.
_OWN = {
    "dataset": "give --dataset",
    "data": "give --data",
    "seed": "give --seeds",
    "loss": "it is each row's own",
    "output": "it is each run's own, in --folder",
    "resume": "it is each run's own, in --folder",
}


def _more(options: ReproduceOptions) -> tuple[str, ...]:
    """Returns the arguments in --more. Raises UserError for those that would make a row another one's."""
    try:
        more = tuple(shlex.split(options.more))
    except ValueError as error:
        raise UserError(f"--more={options.more!r} ends within a quotation") from error
    given = {name for name in ("epochs", "validate_on") if getattr(options, name) is not None}
    own = {**_OWN, **{name: f"{flag(name)} is given, too" for name in given}}
    named = parsing.names(Config, more)
    refuse({f"--more={options.more!r}: {flag(name)} can't be in it; {why}": name in named for name, why in own.items()})
    return more


def _not_run(entries: Plan, known: Rows, options: ReproduceOptions) -> list[Failure]:
    """Returns one failure for all runs that are missing, where --no-run trains none."""
    wanted, runs, stages = list(unique(entries)), missing_runs(entries, known), missing_stages(entries, known)
    missing = [entry for entry in wanted if entry in stages or (entry.id not in known and entry.run in runs)]
    what = f"{len(missing)} of {len(wanted)} runs"
    return [without_job(what, options.folder, "not finished, and --no-run starts none")] if missing else []
