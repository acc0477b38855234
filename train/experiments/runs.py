"""The runs behind a table: each known by what it computes, kept in a folder of that name, and read as one row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from rcl_fast.train import checkpoints, config, status
from rcl_fast.train.config import RESUMABLE, Config
from rcl_fast.train.experiments.tables import Column, Options, Row, Table

# What may differ between two runs that give the same figures: where things are, and how fast they are computed.
IGNORED = {
    "data": RESUMABLE["data"],
    "run": (RESUMABLE["run"] - {"precision"}) | {"output", "resume"},
}
_COMMANDS = Path(__file__).parents[1]
TRAIN, SECOND_STAGES = _COMMANDS / "run.py", _COMMANDS / "second_stage.py"
MAKES_IMBALANCE = ("digits_lt", "cifar10_lt", "cifar100_lt")


class Setting(NamedTuple):
    """What the command line changes of a table's runs; nothing of it is the paper's."""

    dataset: str | None = None
    epochs: int | None = None
    validate_on: str | None = None
    more: tuple[str, ...] = ()  # any options of train/run.py, as given

    def words(self, table: Table) -> list[str]:
        """What differs from the paper's setting; empty: nothing."""
        replaced = self.dataset is not None and self.dataset not in _datasets(table)
        found = {
            "epochs": f"{self.epochs} epoch{'s' * (self.epochs != 1)}",
            "validate_on": f"--validate-on {self.validate_on}",
            "more": shlex.join(self.more),
        }
        return [f"{self.dataset} in place of the paper's data sets"] * replaced + [
            text for name, text in found.items() if self.changes(table, name)
        ]

    def changes(self, table: Table, name: str) -> bool:
        """Whether that field changes what is computed; --more="--cuda-graph" only changes how."""
        without = self._replace(**{name: self._field_defaults[name]})
        return self != without and any(
            key(_parsed(_arguments(row, column, self))) != key(_parsed(_arguments(row, column, without)))
            for column in adapt(table, self.dataset).columns
            for row in table.rows
            if row.options is not None
        )


class Run(NamedTuple):
    """One training: the options of train/run.py that say what it computes, and where it is kept."""

    arguments: tuple[str, ...]
    config: Config
    folder: Path
    data: Path | None

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        data, loss = self.config.data, self.config.loss
        factor = f" IF {data.imbalance:g}" if data.dataset in MAKES_IMBALANCE else ""
        return f"{data.dataset}{factor} {loss.loss} seed {self.config.run.seed} ({self.key})"


State = Literal["missing", "half done", "finished"]


def adapt(table: Table, dataset: str | None) -> Table:
    """The table on one data set: its columns there, or if it has none, that one in place of each of its own.

    In place of another data set the paper's numbers mean nothing: they are left out.
    """
    if dataset is None:
        return table
    if dataset in _datasets(table):
        kept = [place for place, column in enumerate(table.columns) if column.options["dataset"] == dataset]
        columns = tuple(table.columns[place] for place in kept)
        rows = [row._replace(paper=tuple(row.paper[place] for place in kept if row.paper)) for row in table.rows]
    else:
        replaced = [column._replace(options=_elsewhere(column, dataset)) for column in table.columns]
        columns = tuple(column for place, column in enumerate(replaced) if column not in replaced[:place])
        rows = [row._replace(paper=()) for row in table.rows]
    return table._replace(columns=columns, rows=tuple(rows))


def _datasets(table: Table) -> set[str]:
    return {column.options["dataset"] for column in table.columns}


def _elsewhere(column: Column, dataset: str) -> Options:
    keeps = ("imbalance",) if dataset in MAKES_IMBALANCE else ()
    return {"dataset": dataset, **{name: column.options[name] for name in keeps if name in column.options}}


def runs_of(
    row: Row, column: Column, setting: Setting, seeds: Iterable[int], folder: Path, data: Path | None
) -> list[Run]:
    """A run a seed, in `folder`; none for a row that has no runs."""
    if row.options is None:
        return []
    arguments = _arguments(row, column, setting)
    first = _parsed(arguments)
    found = []
    for seed in seeds:
        of_seed = dataclasses.replace(first, run=dataclasses.replace(first.run, seed=seed))
        with_seed = (*arguments, "--seed", str(seed))
        found.append(Run(with_seed, of_seed, folder / key(of_seed), folder_of_data(data, first.data.dataset)))
    return found


def _arguments(row: Row, column: Column, setting: Setting) -> tuple[str, ...]:
    """Of train/run.py, for any seed."""
    options = {**column.options, **(row.options or {})}
    if options["dataset"].startswith("cifar"):
        options["validate_on"] = "test"  # CIFAR's published figures are selected there
    options.update({name: value for name in ("epochs", "validate_on") if (value := getattr(setting, name)) is not None})
    return (*flags(options), *setting.more)


@cache
def _parsed(arguments: tuple[str, ...]) -> Config:
    """Kept, for it takes longer than all the rest, and tables ask for the same again."""
    return config.parse(arguments)


def flags(options: Options) -> list[str]:
    """Options as the command line has them."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", str(value)]
    return found


def folder_of_data(data: Path | None, dataset: str) -> Path | None:
    """DATA/DATASET where there is such a folder, else DATA: a table may need several data sets."""
    return data / dataset if data is not None and (data / dataset).is_dir() else data


def key(settings: Config) -> str:
    """Names what a run computes: a hash of the resolved configuration, without where and on what machine.

    Options at their class's default are left out, so that one added later changes no name; `check_saved` sees where
    such a default has changed instead.
    """
    values = {
        f"{section}.{name}": value
        for section, options in settings.to_dict().items()
        for name, value in options.items()
        if name not in IGNORED.get(section, ()) and value != _DEFAULTS[section].get(name, _NO_DEFAULT)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


_NO_DEFAULT = object()
_DEFAULTS = {
    section: {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default  # as JSON has it
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    for section, kind in get_type_hints(Config).items()
}


def state(of: Run) -> State:
    """Whether there is anything left to do; raises SystemExit where the folder holds another run."""
    if (of.folder / "config.json").is_file():
        check_saved(of)
    results = _read(of.folder / "metrics.json")
    trained = results and not results["interrupted"] and results["last_epoch"] == of.config.optimization.epochs
    if trained and status.read(of.folder) == "finished":  # with its report: that may have failed after the figures
        return "finished"
    return "half done" if checkpoints.exist(of.folder) else "missing"


def check_saved(of: Run) -> None:
    """Raises SystemExit where the folder's run is of other values than the table's now are."""
    saved, wanted = config.saved_config(of.folder).to_dict(), of.config.to_dict()
    differing = [
        f"--{name.replace('_', '-')} {saved[section][name]} there, {value} now"
        for section, options in wanted.items()
        for name, value in options.items()
        if saved[section][name] != value
        and name not in IGNORED.get(section, ())
        and not (name == "loader" and value == "auto")  # config.json has the loader that auto became
    ]
    if differing:
        raise SystemExit(f"{of.folder} holds a run of other values ({'; '.join(differing)}): move it away")


def command(of: Run, processes: int = 1) -> list[str]:
    """What trains the run from where it stands."""
    data = [] if of.data is None else ["--data", str(of.data)]
    start = [sys.executable, str(_shown(TRAIN))]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        start[1:1] = torchrun
    if state(of) == "half done":
        return [*start, "--resume", str(of.folder), *_computed_otherwise(of), *data]
    return [*start, *of.arguments, *data, "--output", str(of.folder)]


def _computed_otherwise(of: Run) -> list[str]:
    """Flags for how a run that was begun is to be computed from now on: it would keep to how it was."""
    saved, wanted = config.saved_config(of.folder).to_dict(), of.config.to_dict()
    return flags(
        {
            name: wanted[section][name]
            for section, names in RESUMABLE.items()
            for name in sorted(names - {"data"})
            if wanted[section][name] not in (None, saved[section][name])
        }
    )


def second_stages_are_built() -> bool:
    return find_spec("rcl_fast.train.second_stage") is not None


def second_stage_command(of: Run, method: str) -> list[str]:
    data = [] if of.data is None else ["--data", str(of.data)]
    return [sys.executable, str(_shown(SECOND_STAGES)), "--run", str(of.folder), "--method", method, *data]


def second_stage_folder(of: Run, method: str) -> Path:
    return of.folder / "second_stage" / method


def _shown(file: Path) -> Path:
    """Relative to here where it can be, as people write it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


_KEPT = (
    *("balanced_accuracy", "harmonic_mean", "geometric_mean", "many", "medium", "few", "worst_class"),
    *("classes_at_zero", "expected_calibration_error", "best_epoch", "last_epoch"),
    *("last_epoch_balanced_accuracy", "last_epoch_harmonic_mean", "selected_on", "parameters", "images_per_second"),
    *("loader", "device", "processes", "precision"),
)
_GROUPS = re.compile(r"(\d+) of \d+ classes are under [^;]*; (\d+) others")


def row_of(of: Run, second_stage: str | None = None) -> dict[str, Any] | None:
    """What a finished run gave, with what it was and on which machine; None where it is not finished."""
    if state(of) != "finished":
        return None
    results = _read(of.folder / "metrics.json")
    if second_stage is not None:
        results = _read(second_stage_folder(of, second_stage) / "metrics.json")
        if not results:
            return None
    return {
        "key": of.key,
        "second_stage": second_stage,
        "dataset": of.config.data.dataset,
        "imbalance": of.config.data.imbalance if of.config.data.dataset in MAKES_IMBALANCE else None,
        "loss": of.config.loss.loss,
        "seed": of.config.run.seed,
        "epochs": of.config.optimization.epochs,
        **{name: results.get(name) for name in _KEPT},
        **_groups(of.folder),
        **_read(of.folder / CLUSTERS),
        "arguments": shlex.join(of.arguments),
        **_provenance(of.folder if second_stage is None else second_stage_folder(of, second_stage)),
    }


CLUSTERS = "clusters.json"
PROVENANCE = "provenance.json"


def _groups(folder: Path) -> dict[str, int]:
    """How many classes the compression rule found failing, from what the run noted."""
    log = folder / "output.log"
    found = _GROUPS.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    if not found:
        return {}
    failing, others = map(int, found[-1])
    return {"failing_classes": failing, "other_classes": others}


def _provenance(folder: Path) -> dict[str, Any]:
    """Of the last start; the commits of all."""
    starts: Sequence[dict[str, Any]] = _read(folder / PROVENANCE).get("starts", [])
    if not starts:
        return {"commit": "not recorded: not started by reproduce.py"}
    return {**starts[-1], "commit": ", ".join(dict.fromkeys(start["commit"] for start in starts))}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
