"""The runs of a table: the folder of each, its state, and the command that trains it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rcl_fast.train.config import RESUMABLE, saved_config
from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments.setting import IGNORED, MAKES_IMBALANCE, Setting, arguments_of, flags, parsed, run_id
from rcl_fast.train.experiments.tables import Column, Row
from rcl_fast.train.options import Config
from rcl_fast.train.report.results import METRICS
from rcl_fast.train.rundir import checkpoint_files, status

_COMMANDS = Path(__file__).parents[1]
TRAIN, SECOND_STAGES = _COMMANDS / "run.py", _COMMANDS / "second_stage.py"


class Run(NamedTuple):
    """One training: the options of train/run.py that define what it computes, and its folder."""

    arguments: tuple[str, ...]
    config: Config
    folder: Path
    data: Path | None

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        data, loss = self.config.data, self.config.loss
        factor = f" IF {data.imbalance:g}" if data.dataset in MAKES_IMBALANCE else ""
        return f"{data.dataset}{factor} {loss.loss} seed {self.config.run.seed} ({self.id})"


State = Literal["missing", "half done", "finished"]


def runs_of(
    row: Row, column: Column, setting: Setting, seeds: Iterable[int], folder: Path, data: Path | None
) -> list[Run]:
    """Returns a run for each seed, with its folder in `folder`; none for a row that has no runs."""
    if row.options is None:
        return []
    arguments = arguments_of(row, column, setting)
    first = parsed(arguments)
    runs = []
    for seed in seeds:
        of_seed = dataclasses.replace(first, run=dataclasses.replace(first.run, seed=seed))
        with_seed = (*arguments, "--seed", str(seed))
        runs.append(Run(with_seed, of_seed, folder / run_id(of_seed), folder_of_data(data, first.data.dataset)))
    return runs


def folder_of_data(data: Path | None, dataset: str) -> Path | None:
    """Returns DATA/DATASET where there is such a folder, else DATA: a table may need several data sets."""
    return data / dataset if data is not None and (data / dataset).is_dir() else data


def check_data(config: Config, data: Path | None) -> None:
    """Raises UserError where the run needs a data set of files and nobody says where that is."""
    if data is None and config.data.data is None and config.data.dataset != "digits_lt":
        raise UserError(f"{config.data.dataset} is to be trained on: say where it is with --data DIR")


def state(of: Run) -> State:
    """Returns how far the run is; raises UserError where the folder holds another run."""
    if (of.folder / "config.json").is_file():
        check_saved(of)
    results = read_json(of.folder / METRICS)
    trained = results and not results["interrupted"] and results["last_epoch"] == of.config.optimization.epochs
    if trained and status.read(of.folder) == "finished":  # with its report, which may have failed later
        return "finished"
    return "half done" if checkpoint_files.exist(of.folder) else "missing"


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
        raise UserError(f"{of.folder} holds a run of other values ({'; '.join(differing)}): move it away")


def command(of: Run, processes: int = 1) -> list[str]:
    """Returns the command that starts the run, or goes on with it."""
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


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
