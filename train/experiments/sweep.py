"""A search over options of the trainer: a grid, or Optuna's TPE by ask and tell, on the queue of runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from rich.table import Table

from rcl_fast.train.config import RESUMABLE, config_of
from rcl_fast.train.errors import UserError, refuse
from rcl_fast.train.experiments import job_queue, runs, study
from rcl_fast.train.experiments.job_queue import Failure, Job
from rcl_fast.train.experiments.runs import Run
from rcl_fast.train.experiments.search_space import Space, corners, grid, parse_space
from rcl_fast.train.experiments.setting import flags
from rcl_fast.train.experiments.study import Trial
from rcl_fast.train.options import Config, SweepOptions
from rcl_fast.train.report import results
from rcl_fast.train.rundir import status
from rcl_fast.train.runtime.console import print_table

_logger = logging.getLogger(__name__)


def sweep(options: SweepOptions, shared: Sequence[str] = ()) -> list[Failure]:
    """Runs the trials that are missing, then prints them all; returns those that failed.

    Args:
        shared: options of train/run.py for all trials, as on its command line.

    Raises:
        UserError: what can't be, before anything runs.
        job_queue.Stopped: a signal came; the same call goes on.
    """
    search = _plan(options, shared)
    study.open_study(options.study, search.content())
    slots = job_queue.find_slots(options.devices, options.jobs_per_device)
    failures = job_queue.run_all(_jobs(search), slots, search.total)
    show(search)
    return [failure for failure in failures if not failure.elsewhere and not _diverged(failure)]


def _diverged(failure: Failure) -> bool:
    return status.read(failure.job.folder) == "diverged"


class Search(NamedTuple):
    """What is to be run."""

    options: SweepOptions
    space: Space
    shared: tuple[str, ...]
    total: int  # trials

    def run(self, trial: Trial) -> Run:
        """Returns the trial's run."""
        arguments = self.arguments(trial.parameters)
        return Run(arguments, _config(arguments), trial.folder, self.options.data)

    def arguments(self, parameters: study.Parameters) -> tuple[str, ...]:
        """Returns what train/run.py is called with, but for the data's folder."""
        return ("--dataset", self.options.dataset, *self.shared, *flags({n: _typed(v) for n, v in parameters.items()}))

    def content(self) -> dict[str, Any]:
        """Returns what all who work on the study must agree on, plain values."""
        common = {
            section: {name: value for name, value in values.items() if name not in RESUMABLE.get(section, set())}
            for section, values in _config(self.arguments({})).to_dict().items()
        }
        space = {name: str(of) for name, of in self.space.items()}
        return {"sampler": self.options.sampler, "space": space, "run": common}


def _plan(options: SweepOptions, shared: Sequence[str]) -> Search:
    refuse(
        {
            f"--trials must be at least 1, got {options.trials}": options.trials is not None and options.trials < 1,
            f"--jobs-per-device must be at least 1, got {options.jobs_per_device}": options.jobs_per_device < 1,
        }
    )
    space = parse_space(options.grid, ranges=options.sampler == "tpe")
    if options.sampler == "tpe":
        if options.trials is None:
            raise UserError("--sampler tpe goes on for ever: say with --trials how many there are to be")
        if find_spec("optuna") is None:
            raise UserError("--sampler tpe needs Optuna: pip install '.[sweep]' in rcl_fast's folder")
        total = options.trials
    else:
        points = sum(1 for _ in grid(space))
        total = points if options.trials is None else min(points, options.trials)
    search = Search(options, space, tuple(shared), total)
    for parameters in corners(space):  # what the trainer would refuse is said before anything is run
        _config(search.arguments(parameters))
    return search


def _config(arguments: tuple[str, ...]) -> Config:
    config = config_of(arguments)
    if config.run.output is not None or config.run.resume is not None:
        raise UserError("--output and --resume are each trial's own: its folder is in --study")
    return config


def _typed(value: Any) -> Any:
    """Makes truth values of "true" and "false", which the command line has as --NAME and --no-NAME."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _jobs(search: Search) -> Iterator[Job]:
    """Gives the trials that are to be run or gone on with, those that were begun first."""
    for trial in study.trials(search.options.study):
        if not trial.is_over:
            yield _job(search, trial)
    new = _new_by_tpe(search) if search.options.sampler == "tpe" else _new_of_the_grid(search)
    for trial in new:
        yield _job(search, trial)


def _job(search: Search, trial: Trial) -> Job:
    run = search.run(trial)
    label = f"trial {trial.number}, one of {search.total}: {_described(trial.parameters)}"
    _logger.info(label)
    return Job(label, runs.command(run), run.folder, run.config.optimization.epochs)


def _new_of_the_grid(search: Search) -> Iterator[Trial]:
    for number, parameters in enumerate(grid(search.space)):
        if number < search.total:
            trial = study.make_trial(search.options.study, number, parameters)
            if trial is not None:
                yield trial


def _new_by_tpe(search: Search) -> Iterator[Trial]:
    """Gives new trials, each chosen when its turn comes by what is then known of the others."""
    from rcl_fast.train.experiments import tpe  # needs Optuna, which a grid does without

    while len(trials := study.trials(search.options.study)) < search.total:
        trial = study.make_trial(search.options.study, len(trials), tpe.ask(search.space, trials))
        if trial is not None:
            yield trial


def _described(parameters: study.Parameters) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in parameters.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(search: Search) -> None:
    """Prints the table of all trials, the best one first."""
    finished = {
        trial.number: study.best_validation(trial.folder)["balanced_accuracy"]
        for trial in study.trials(search.options.study)
        if trial.status == "finished"
    }
    ordered = sorted(study.trials(search.options.study), key=lambda trial: -finished.get(trial.number, -1.0))
    table = Table("trial", *search.space)
    for name in ("validation", "epoch", "test", ""):
        table.add_column(name, justify="right")
    selected_on = set()
    for trial in ordered:
        figures = ["–", "–", "–"]
        if trial.number in finished:
            metrics = json.loads((trial.folder / results.METRICS).read_text(encoding="utf-8"))
            selected_on.add(metrics["selected_on"])
            accuracies = finished[trial.number], metrics["balanced_accuracy"]
            figures = [f"{accuracies[0]:.1%}", str(metrics["best_epoch"]), f"{accuracies[1]:.1%}"]
        values = (_short(trial.parameters.get(name, "–")) for name in search.space)
        table.add_row(str(trial.number), *values, *figures, _shown_status(trial))
    _logger.info(f"{search.options.study}: balanced accuracy of {len(ordered)} trial{'s' * (len(ordered) != 1)}")
    print_table(table)
    if selected_on:
        best = ordered[0]
        _logger.info(f"best: {_described(best.parameters)}, in {best.folder}; selected on {', '.join(selected_on)}")


def _shown_status(trial: Trial) -> str:
    started = (trial.folder / job_queue.LOG).is_file()
    return "" if trial.status == "finished" else trial.status or ("failed at its start" if started else "not begun")
