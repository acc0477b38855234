"""A search over options of the trainer: a grid, or Optuna's TPE by ask and tell, on the queue of runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from rich.table import Table

from rcl_fast.train.arguments import parsing
from rcl_fast.train.arguments.ranges import flag
from rcl_fast.train.config import RESUMABLE, config_of
from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments import job_queue, runs, study
from rcl_fast.train.experiments.devices import check_devices
from rcl_fast.train.experiments.job_queue import Failure, Job, without_job
from rcl_fast.train.experiments.runs import Run
from rcl_fast.train.experiments.search_space import Space, corners, grid, parse_space, size
from rcl_fast.train.experiments.setting import flags
from rcl_fast.train.experiments.study import Trial
from rcl_fast.train.options import Config, SweepOptions
from rcl_fast.train.rundir import status
from rcl_fast.train.runtime.console import print_table
from rcl_fast.train.runtime.wording import counted

_logger = logging.getLogger(__name__)

MOST_TRIALS = 100_000


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
    check_devices(options.devices)
    slots = job_queue.find_slots(options.devices, options.jobs_per_device)
    study.open_study(options.study, search.content())
    failures = job_queue.run_all(_jobs(search), slots, search.total)
    damaged = show(search)
    return [failure for failure in failures if status.read(failure.job.folder) not in study.OVER] + damaged


class Search(NamedTuple):
    """What is to be run."""

    options: SweepOptions
    space: Space
    shared: tuple[str, ...]
    total: int  # trials

    def run(self, trial: Trial) -> Run:
        """Returns the trial's run."""
        arguments = self.arguments(trial.parameters)
        return Run(arguments, config_of(arguments), trial.folder, self.options.data)

    def arguments(self, parameters: study.Parameters) -> tuple[str, ...]:
        """Returns what train/run.py is called with, but for the data's folder."""
        return ("--dataset", self.options.dataset, *self.shared, *flags({n: _typed(v) for n, v in parameters.items()}))

    def content(self) -> dict[str, Any]:
        """Returns what all who work on the study must agree on, plain values."""
        common = {
            section: {name: value for name, value in values.items() if name not in RESUMABLE.get(section, set())}
            for section, values in config_of(self.arguments({})).to_dict().items()
        }
        space = {name: str(of) for name, of in self.space.items()}
        return {"sampler": self.options.sampler, "space": space, "run": common}


def _plan(options: SweepOptions, shared: Sequence[str]) -> Search:
    """Returns what is to be run. Raises UserError for what the trainer would refuse, before anything is."""
    study.check_place(options.study, options.data)
    space = parse_space(options.grid, ranges=options.sampler == "tpe")
    if options.sampler == "tpe":
        if options.trials is None:
            raise UserError("--sampler tpe goes on for ever: say with --trials how many there are to be")
        if find_spec("optuna") is None:
            raise UserError("--sampler tpe needs Optuna: pip install '.[sweep]' in rcl_fast's folder")
        total = options.trials
    else:
        total = size(space) if options.trials is None else min(size(space), options.trials)
        if total > MOST_TRIALS:
            raise UserError(
                f"--grid has {total:,} combinations, and a search at most {MOST_TRIALS:,} trials: --trials N"
            )
    _check_shared(shared, space)
    search = Search(options, space, tuple(shared), total)
    configs = [config_of(search.arguments(parameters)) for parameters in corners(space)]
    runs.check_data(configs[0], options.data)
    return search


def _check_shared(shared: Sequence[str], space: Space) -> None:
    """Raises UserError for options after -- that would be overridden, or would override the search's own."""
    given = set(parsing.names(Config, shared))
    if given & {"output", "resume"}:
        raise UserError("--output and --resume are each trial's own: its folder is in --study")
    for name in ("dataset", "data"):
        if name in given:
            raise UserError(f"{flag(name)} is of the whole search: give it before --")
    both = [flag(name) for name in space if name in given]
    if both:
        raise UserError(f"{', '.join(both)}: after -- for all trials, and in --grid, too; leave one of the two out")


def _typed(value: Any) -> Any:
    """Makes truth values of "true" and "false", which the command line has as --NAME and --no-NAME."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _jobs(search: Search) -> Iterator[Job | Failure]:
    """Gives each trial that is not over once, as long as there are any: others may leave some meanwhile."""
    tried: set[int] = set()
    while (trial := _next(search, tried)) is not None:
        tried.add(trial.number)
        yield _job(search, trial)


def _job(search: Search, trial: Trial) -> Job | Failure:
    run = search.run(trial)
    label = f"trial {trial.number}, one of {search.total}: {_described(trial.parameters)}"
    try:
        return Job(label, runs.command(run), run.folder, run.config.optimization.epochs)
    except UserError as error:  # what lies in its folder is damaged
        return without_job(label, run.folder, str(error))


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


def show(search: Search) -> list[Failure]:
    """Prints the table of all trials, the best one first; returns those with a damaged file, and what to do."""
    trials = study.trials(search.options.study)
    finished, wrong = study.results(trials)
    ordered = sorted(trials, key=lambda trial: -finished[trial.number].validation if trial.number in finished else 1.0)
    table = Table("trial", *search.space)
    for name in ("validation", "epoch", "test", ""):
        table.add_column(name, justify="right")
    for trial in ordered:
        figures = finished.get(trial.number)
        cells = ["–", "–", "–"] if figures is None else _cells(figures)
        values = (_short(trial.parameters.get(name, "–")) for name in search.space)
        table.add_row(str(trial.number), *values, *cells, "damaged" if trial.number in wrong else _shown_status(trial))
    _logger.info(f"{search.options.study}: balanced accuracy of {counted(ordered, 'trial')}")
    print_table(table)
    if finished:
        best, selected_on = ordered[0], dict.fromkeys(figures.selected_on for figures in finished.values())
        _logger.info(f"best: {_described(best.parameters)}, in {best.folder}; selected on {', '.join(selected_on)}")
    return [
        without_job(f"trial {trial.number}", trial.folder, wrong[trial.number])
        for trial in trials
        if trial.number in wrong
    ]


def _cells(figures: study.Figures) -> list[str]:
    test = "–" if figures.test is None else f"{figures.test:.1%}"
    return [f"{figures.validation:.1%}", str(figures.epoch), test]


def _shown_status(trial: Trial) -> str:
    if trial.status == "finished":
        return ""
    if job_queue.is_taken(trial.folder):
        return "running"
    started = (trial.folder / job_queue.LOG).is_file()
    return trial.status or ("failed at its start" if started else "not begun")
