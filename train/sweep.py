"""A search over options of the trainer, in trials that survive their workers: `python train/sweep.py --help`."""

from __future__ import annotations

import os

if __name__ == "__main__":  # read when PyTorch loads: threads that wait for work then let others run
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from rcl_fast.train import config
from rcl_fast.train.config import RESUMABLE
from rcl_fast.train.jobs import train
from rcl_fast.train.loop.loss_readback import NonFiniteLoss
from rcl_fast.train.options import Config, Dataset
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoints, status

try:
    import optuna
except ModuleNotFoundError as error:
    raise SystemExit("train/sweep.py needs Optuna: pip install '.[sweep]' in rcl_fast's folder") from error
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState


@dataclass(frozen=True)
class Options:
    """What is searched, and where it is kept."""

    dataset: Dataset
    """Data set and recipe, as for train/run.py."""
    study: Path
    """File of the study: made where there is none, joined or gone on with where there is one. The trials' runs are
    beside it, in STUDY-trials/."""
    grid: tuple[str, ...]
    """Options of train/run.py and their values: tau=1.0,1.3,1.5 compression_rest=0.005,0.05. With --sampler tpe also
    ranges: lr=0.05..0.4, or lr=0.01..1:log."""
    data: Path | None = None
    """Folder that holds the data set."""
    sampler: Literal["grid", "tpe"] = "grid"
    """grid: every combination once. tpe: Optuna's tree-structured Parzen estimator, as many as --trials."""
    trials: int | None = None
    """How many trials there are in all, whoever runs them. None: the whole grid."""


_DESCRIPTION = """Search over options of train/run.py with Optuna; each trial is a run.

Examples:
  train/sweep.py --dataset cifar100_lt --data DIR --study runs/a.log --grid tau=1.0,1.3,1.5 compression_rest=0.005,0.05
  train/sweep.py --dataset digits_lt --study runs/lr.log --grid lr=0.01..0.5:log --sampler tpe --trials 20
  train/sweep.py --dataset digits_lt --study runs/tau.log --grid tau=0,1 -- --epochs 20 --loss bcl_rcl

Behind -- stands what all trials share, any options of train/run.py.

What counts is the balanced accuracy on validation of a trial's best epoch. The test set's is shown beside it, and
chooses nothing, unless --validate-on test makes the two the same.

The same command again joins the study or goes on with it: finished trials are not repeated, and a trial whose worker
was stopped or killed goes on from its last checkpoint. Several workers share a study:
  for gpu in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$gpu train/sweep.py ... & done
Each takes one trial at a time; of several machines, all must see the same folder. A trial whose loss diverges counts
as failed; any other error ends the worker, and its trial is taken up by the next one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options = tyro.cli(Options, args=given[:end], prog="train/sweep.py", description=_DESCRIPTION)
    sweep(options, given[end + 1 :])


def sweep(options: Options, shared: Sequence[str] = ()) -> None:
    """Run trials until none is left that no other worker has, then print them all. Raises SystemExit."""
    console = Console(soft_wrap=True)
    say = partial(console.print, highlight=False, markup=False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("a sweep's trials run on one process each: start several workers, without torchrun")
    space = _space(options)
    settings = partial(_settings, _arguments(options, shared))
    _check_values(space, settings)
    study = _Study(options, space, _comparable(settings({})))
    while (trial := study.next_trial()) is not None:
        try:
            say(f"trial {trial.number}, one of {study.total}: {_described(trial.parameters)}")
            _run_trial(trial, settings(trial.parameters), study, say)
        finally:
            trial.lock.release()
    show(console, study)


class _Trial(NamedTuple):
    """A trial of this worker: no other takes it while this one holds the lock, which it does from the start."""

    number: int
    parameters: dict[str, Any]
    folder: Path
    lock: FileLock


class _Study:
    """The study in its file, and who runs which of its trials.

    The file is Optuna's journal, and not SQLite: a worker only ever appends to it, one at a time, and that is safe on
    network file systems too, where SQLite's locks are not, and where its writers give up on a locked file after a few
    seconds. Optuna's heartbeat, which needs a database, is replaced by a lock on each trial's folder that its worker
    holds: the system releases it with the worker's last process, however that ends, so nothing has to time out.
    """

    def __init__(self, options: Options, space: dict[str, BaseDistribution], of: dict[str, Any]) -> None:
        """Raises SystemExit where the file holds another study."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.file = options.study
        self._space = space
        self._folder = self.file.with_name(f"{self.file.stem}-trials")
        sizes = [len(kind.choices) for kind in space.values() if isinstance(kind, CategoricalDistribution)]
        grid = math.prod(sizes)
        self.total = grid if options.trials is None else options.trials
        if options.sampler == "grid":
            self.total = min(self.total, grid)  # or GridSampler would begin again
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._folder / "next.lock")
            with self._lock:
                storage = JournalStorage(JournalFileBackend(str(self.file)))
                self._study = _open(storage, _sampler(options.sampler, space))
                # GridSampler ends the loop of optimize() when it is told of the grid's last point; there is none here.
                self._telling = _open(storage, RandomSampler())
                self._check_same({"sampler": options.sampler, "space": _spelled(space), "run": of})
        except (OSError, ValueError) as error:
            raise SystemExit(f"--study {self.file}: {error}") from error

    def _check_same(self, of: dict[str, Any]) -> None:
        before = self._study.user_attrs.get("of")
        if before is None:
            self._study.set_user_attr("of", of)
            return
        flat = [_flat(json.loads(json.dumps(one))) for one in (before, of)]
        differing = [
            f"{name} (was {flat[0].get(name)}, now {flat[1].get(name)})"
            for name in {**flat[0], **flat[1]}
            if flat[0].get(name) != flat[1].get(name)
        ]
        if differing:
            raise SystemExit(
                f"--study {self.file} is of another sweep: {', '.join(differing)}. Name another file, or give the same "
                "options"
            )

    def next_trial(self) -> _Trial | None:
        """One that another worker left, or a new one; None where there is none."""
        with self._lock:  # between looking and taking
            for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                lock = self._lock_of(frozen.number)
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue
                # Its worker may have died before every value was drawn.
                return self._taken(optuna.Trial(self._study, frozen._trial_id), lock)
            if len(self._study.get_trials(deepcopy=False)) >= self.total:
                return None
            trial = self._study.ask()
            lock = self._lock_of(trial.number)
            lock.acquire()
            return self._taken(trial, lock)

    def _lock_of(self, number: int) -> FileLock:
        folder = self.folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "worker.lock")

    def _taken(self, trial: optuna.Trial, lock: FileLock) -> _Trial:
        values = {name: _suggested(trial, name, kind) for name, kind in self._space.items()}
        return _Trial(trial.number, values, self.folder(trial.number), lock)

    def folder(self, number: int) -> Path:
        """Of a trial's run."""
        return self._folder / f"{number:04d}"

    def finished(self, number: int, accuracy: float) -> None:
        self._telling.tell(number, accuracy)

    def failed(self, number: int) -> None:
        self._telling.tell(number, state=TrialState.FAIL)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """From best to worst, then those without a figure."""
        trials = self._telling.get_trials(deepcopy=False)
        return sorted(trials, key=lambda trial: (-trial.value if trial.value is not None else 1.0, trial.number))


def _open(storage: JournalStorage, sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(
        storage=storage, sampler=sampler, study_name="sweep", direction="maximize", load_if_exists=True
    )


def _sampler(name: str, space: dict[str, BaseDistribution]) -> BaseSampler:
    if name == "tpe":
        return TPESampler(constant_liar=True)  # several workers then don't all try the same
    return GridSampler(
        {name: kind.choices for name, kind in space.items() if isinstance(kind, CategoricalDistribution)}
    )


def _suggested(trial: optuna.Trial, name: str, kind: BaseDistribution) -> Any:
    if isinstance(kind, FloatDistribution):
        return trial.suggest_float(name, kind.low, kind.high, log=kind.log)
    assert isinstance(kind, CategoricalDistribution)
    return trial.suggest_categorical(name, kind.choices)


def _run_trial(trial: _Trial, settings: Config, study: _Study, say: Callable[[str], None]) -> None:
    """Train, or go on, and tell the study. What stops the worker passes through, and the trial is left for another."""
    if status.read(trial.folder) != "finished":  # else its worker died before it could tell
        try:
            train.run(_placed(settings, trial.folder))
        except SystemExit as error:
            if not isinstance(error.__cause__, NonFiniteLoss):
                raise
            say(str(error))
            study.failed(trial.number)
            return
    if status.read(trial.folder) != "finished":
        raise SystemExit(f"stopped in trial {trial.number}; the same command goes on with it")
    study.finished(trial.number, best_validation(trial.folder)["balanced_accuracy"])


def _placed(settings: Config, folder: Path) -> Config:
    """The same as a run in that folder, which goes on where one was begun there."""
    if not checkpoints.exist(folder):
        return dataclasses.replace(settings, run=dataclasses.replace(settings.run, output=folder))
    saved = config.saved_config(folder)
    mine = {
        section: {name: getattr(getattr(settings, section), name) for name in names}
        for section, names in RESUMABLE.items()
    }
    return dataclasses.replace(
        saved,
        data=dataclasses.replace(saved.data, **mine["data"]),
        run=dataclasses.replace(saved.run, **mine["run"]),
    )


def best_validation(folder: Path) -> dict[str, Any]:
    """The row of a run's metrics.jsonl with the highest balanced accuracy, the first of several."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(rows, key=lambda row: row["balanced_accuracy"])


def _space(options: Options) -> dict[str, BaseDistribution]:
    """What --grid says. Raises SystemExit."""
    if options.trials is not None and options.trials < 1:
        raise SystemExit(f"--trials must be at least 1, got {options.trials}")
    if options.sampler == "tpe" and options.trials is None:
        raise SystemExit("--sampler tpe goes on for ever: say with --trials how many there are to be")
    space: dict[str, BaseDistribution] = {}
    for item in options.grid:
        name, _, values = item.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not name or not values or "" in values.split(","):
            raise SystemExit(f"--grid {item}: expected an option of train/run.py and its values, like tau=1.0,1.3")
        if name in space:
            raise SystemExit(f"--grid {item}: {name} is there twice")
        if ".." in values and options.sampler == "tpe":
            space[name] = _range(item, values)
        else:
            space[name] = CategoricalDistribution(tuple(dict.fromkeys(values.split(","))))
    if not space:
        raise SystemExit("--grid needs at least one option, like tau=1.0,1.3,1.5")
    return space


def _range(item: str, values: str) -> FloatDistribution:
    bounds, _, scale = values.partition(":")
    low, _, high = bounds.partition("..")
    try:
        if scale not in ("", "log"):
            raise ValueError(f"{scale!r} is no scale; there is log")
        return FloatDistribution(float(low), float(high), log=scale == "log")
    except ValueError as error:
        raise SystemExit(f"--grid {item}: {error}; a range is LOW..HIGH or LOW..HIGH:log") from error


def _arguments(options: Options, shared: Sequence[str]) -> list[str]:
    data = [] if options.data is None else ["--data", str(options.data)]
    return ["--dataset", options.dataset, *data, *shared]


def _settings(arguments: Sequence[str], parameters: dict[str, Any]) -> Config:
    """Of a trial. Raises SystemExit as train/run.py does."""
    flags = [flag for name, value in parameters.items() for flag in _flags(name, value)]
    settings = config.parse([*arguments, *flags])
    if settings.run.output is not None or settings.run.resume is not None:
        raise SystemExit("--output and --resume are each trial's own: the study's file says where they are")
    return settings


def _flags(name: str, value: Any) -> list[str]:
    dashed = name.replace("_", "-")
    if str(value).lower() in ("true", "false"):
        return [f"--{dashed}" if str(value).lower() == "true" else f"--no-{dashed}"]
    return [f"--{dashed}", str(value)]


def _check_values(space: dict[str, BaseDistribution], settings: Callable[[dict[str, Any]], Config]) -> None:
    """Raises SystemExit for what the trainer would refuse, before anything is run: each value beside the first ones."""
    ends = {
        name: list(kind.choices) if isinstance(kind, CategoricalDistribution) else [kind.low, kind.high]  # type: ignore[attr-defined]
        for name, kind in space.items()
    }
    first = {name: values[0] for name, values in ends.items()}
    for name, values in ends.items():
        for value in values:
            settings({**first, name: value})


def _comparable(settings: Config) -> dict[str, Any]:
    """The configuration without what workers may differ in."""
    return {
        section: {name: value for name, value in options.items() if name not in RESUMABLE.get(section, set())}
        for section, options in settings.to_dict().items()
    }


def _spelled(space: dict[str, BaseDistribution]) -> dict[str, Any]:
    return {
        name: ",".join(map(str, kind.choices)) if isinstance(kind, CategoricalDistribution) else str(kind)
        for name, kind in space.items()
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def _described(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in parameters.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(console: Console, study: _Study) -> None:
    """Print the table of all trials, the best one first."""
    trials = study.trials()
    names = list(study._space)
    table = Table("trial", *names, title=f"{study.file}: balanced accuracy of {len(trials)} trials")
    for name in ("validation", "epoch", "test", ""):
        table.add_column(name, justify="right")
    selected_on = set()
    for trial in trials:
        folder = study.folder(trial.number)
        figures = ["–", "–", "–"]
        if trial.value is not None:
            found = json.loads((folder / results.METRICS).read_text(encoding="utf-8"))
            selected_on.add(found["selected_on"])
            figures = [f"{trial.value:.1%}", str(found["best_epoch"]), f"{found['balanced_accuracy']:.1%}"]
        became = {TrialState.COMPLETE: "", TrialState.FAIL: "diverged"}.get(trial.state, "running")
        table.add_row(str(trial.number), *(_short(trial.params.get(name, "–")) for name in names), *figures, became)
    console.print(table)
    if selected_on:
        best = trials[0]
        console.print(
            f"best: {_described(best.params)}, in {study.folder(best.number)}; selected on {', '.join(selected_on)}",
            highlight=False,
            markup=False,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
