"""The runs of a table: the folder of each, its state, and the command that trains it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rcl_fast.train.config import RESUMABLE, saved_config
from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments.setting import IGNORED, MAKES_IMBALANCE, Setting, arguments_of, flags, parsed, run_id
from rcl_fast.train.experiments.tables import Column, Row
from rcl_fast.train.options import Config
from rcl_fast.train.rundir import checkpoint_files, result_files

_COMMANDS = Path(__file__).parents[1]
TRAIN, SECOND_STAGES = _COMMANDS / "run.py", _COMMANDS / "second_stage.py"


class Run(NamedTuple):
    """One training: the options of train/run.py that define what it computes, and its folder."""

    arguments: tuple[str, ...]
    config: Config
    folder: Path
    data: Path | None
    own: str = ""  # its row's and column's further options, in words

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        data, loss = self.config.data, self.config.loss
        factor = f" IF {data.imbalance:g}" if data.dataset in MAKES_IMBALANCE else ""
        return f"{data.dataset}{factor} {loss.loss}{self.own} seed {self.config.run.seed} ({self.id})"


State = Literal["missing", "half done", "finished", "unusable"]


def runs_of(
    row: Row, column: Column, setting: Setting, seeds: Iterable[int], folder: Path, data: Path | None
) -> list[Run]:
    """Returns a run for each seed, with its folder in `folder`; none for a row that has no runs."""
    if row.options is None:
        return []
    arguments = arguments_of(row, column, setting)
    first, own = parsed(arguments), _in_words({**column.options, **row.options})
    runs = []
    for seed in seeds:
        of_seed = dataclasses.replace(first, run=dataclasses.replace(first.run, seed=seed))
        with_seed = (*arguments, "--seed", str(seed))
        place = folder / run_id(of_seed), folder_of_data(data, first.data.dataset)
        runs.append(Run(with_seed, of_seed, *place, own))
    return runs


def _in_words(options: Mapping[str, Any]) -> str:
    """Returns the options that a label does not have otherwise: they tell runs of one loss on one data set apart."""
    shown = ("dataset", "imbalance", "loss")
    words = " ".join(flags({name: value for name, value in options.items() if name not in shown}))
    return f" {words}" * bool(words)


def folder_of_data(data: Path | None, dataset: str) -> Path | None:
    """Returns DATA/DATASET where there is such a folder, else DATA: a table may need several data sets."""
    return data / dataset if data is not None and (data / dataset).is_dir() else data


def check_data(config: Config, data: Path | None) -> None:
    """Raises UserError where the run needs a data set of files, and nobody says where that is or it is no folder."""
    folder = data or config.data.data
    if config.data.dataset == "digits_lt":
        return
    if folder is None:
        raise UserError(f"{config.data.dataset} is to be trained on: say where it is with --data DIR")
    if not os.path.isdir(folder):
        raise UserError(f"{config.data.dataset} is to be trained on, and --data {folder} is no folder: say where it is")


def state(of: Run) -> State:
    """Returns how far the run is; "unusable": its folder holds a damaged file or another run, as `problem` says."""
    if problem(of) is not None:
        return "unusable"
    if result_files.is_finished(of.folder, of.config.optimization.epochs):
        return "finished"
    return "half done" if checkpoint_files.exist(of.folder) else "missing"


def problem(of: Run) -> str | None:
    """Returns why what lies in the run's folder can't be used, and what to do; None where it can."""
    try:
        result_files.read_metrics(of.folder)
    except UserError as error:
        return f"{error}: move it away, and the same command makes it anew"
    try:
        if (of.folder / "config.json").is_file() or checkpoint_files.exist(of.folder):
            check_saved(of)
    except UserError as error:
        return f"{error}: move {of.folder} away, and the same command trains it anew"
    return None


def check_saved(of: Run) -> None:
    """Raises UserError where the folder's run has other options than the table's run."""
    saved, wanted = saved_config(of.folder).to_dict(), of.config.to_dict()
    differing = [
        f"--{name.replace('_', '-')} {saved[section][name]} there, {value} now"
        for section, options in wanted.items()
        for name, value in options.items()
        if saved[section][name] != value
        and name not in IGNORED.get(section, ())
        and not (name == "loader" and value == "auto")  # config.json has the loader that auto stood for
    ]
    if differing:
        raise UserError(f"{of.folder} holds a run of other values ({'; '.join(differing)})")


def command(of: Run, processes: int = 1) -> list[str]:
    """Returns the command that starts the run, or goes on with it. Raises UserError where its folder is unusable."""
    why = problem(of)
    if why is not None:
        raise UserError(why)
    data = [] if of.data is None else ["--data", str(of.data)]
    start = [sys.executable, str(_shown(TRAIN))]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        start[1:1] = torchrun
    if state(of) == "half done":
        return [*start, "--resume", str(of.folder), *_computed_otherwise(of), *data]
    return [*start, *of.arguments, *data, "--output", str(of.folder)]


def _computed_otherwise(of: Run) -> list[str]:
    """Returns the flags for how a half-done run is computed from now on; without them it would go on as before."""
    saved, wanted = saved_config(of.folder).to_dict(), of.config.to_dict()
    return flags(
        {
            name: wanted[section][name]
            for section, names in RESUMABLE.items()
            for name in sorted(names - {"data"})
            if wanted[section][name] not in (None, saved[section][name])
        }
    )


def second_stage_command(of: Run, method: str) -> list[str]:
    data = [] if of.data is None else ["--data", str(of.data)]
    return [sys.executable, str(_shown(SECOND_STAGES)), "--run", str(of.folder), "--method", method, *data]


def second_stage_folder(of: Run, method: str) -> Path:
    return of.folder / "second_stage" / method


def _shown(file: Path) -> Path:
    """Returns the path relative to the current folder where it lies below that, as people write it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
