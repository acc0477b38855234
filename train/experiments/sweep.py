"""A search over options of the trainer: a grid, or Optuna's TPE by ask and tell, on the queue of runs."""

from __future__ import annotations

import itertools
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
    """Runs the trials that are missing, then prints them all; returns those without an end, and why.

    A trial that another process is at when there is nothing else left to do is among them.

    Args:
        shared: options of train/run.py for all trials, as on its command line.

    Raises:
        UserError: what can't be, before anything runs.
        job_queue.Stopped: a signal came; the same call goes on.
    """
    search = _plan(options, shared)
    slots = job_queue.find_slots(options.devices, options.jobs_per_device)
    study.open_study(options.study, search.content())
    failures = job_queue.run_all(_jobs(search), slots, search.total)
    show(search)
    return [failure for failure in failures if status.read(failure.job.folder) not in study.OVER]


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
    """Returns what is to be run. Raises UserError for what the trainer would refuse, before anything is."""
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
    configs = [_config(search.arguments(parameters)) for parameters in corners(space)]
    runs.check_data(configs[0], options.data)
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
    """Gives each trial that is not over once, as long as there are any: others may leave some meanwhile."""
    tried: set[int] = set()
    while (trial := _next(search, tried)) is not None:
        tried.add(trial.number)
        run = search.run(trial)
        label = f"trial {trial.number}, one of {search.total}: {_described(trial.parameters)}"
        yield Job(label, runs.command(run), run.folder, run.config.optimization.epochs)


def _next(search: Search, tried: set[int]) -> Trial | None:
    """Returns a trial that was begun and that nobody is at, else a new one, else one that another process is at."""
    trials = study.trials(search.options.study)
    begun = [trial for trial in trials if not trial.is_over and trial.number not in tried]
    free = [trial for trial in begun if not job_queue.is_taken(trial.folder)]
    if free:
        return free[0]
    return _new(search) or next(iter(begun), None)


def _new(search: Search) -> Trial | None:
    """Makes the next trial that there is none of; None where there are all."""
    while len(trials := study.trials(search.options.study)) < search.total:
        numbers = {trial.number for trial in trials}
        number = next(number for number in range(search.total) if number not in numbers)
        trial = study.make_trial(search.options.study, number, _parameters(search, number, trials))
        if trial is not None:  # else another process was quicker
            return trial
    return None


def _parameters(search: Search, number: int, trials: Sequence[Trial]) -> dict[str, Any]:
    if search.options.sampler == "grid":
        return next(itertools.islice(grid(search.space), number, None))
    from rcl_fast.train.experiments import tpe  # needs Optuna, which a grid does without

    return tpe.ask(search.space, trials)


def _described(parameters: study.Parameters) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in parameters.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(search: Search) -> None:
    """Prints the table of all trials, the best one first."""
    trials = study.trials(search.options.study)
    finished = {
        trial.number: study.best_validation(trial.folder)["balanced_accuracy"]
        for trial in trials
        if trial.status == "finished"
    }
    ordered = sorted(trials, key=lambda trial: -finished.get(trial.number, -1.0))
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
    if trial.status == "finished":
        return ""
    if job_queue.is_taken(trial.folder):
        return "running"
    started = (trial.folder / job_queue.LOG).is_file()
    return trial.status or ("failed at its start" if started else "not begun")
