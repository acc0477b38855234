"""The command line's changes to a table's runs, and the name of a run: a hash of what it computes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from functools import cache
from typing import NamedTuple, get_type_hints

from rcl_fast.train.checks import MAKES_IMBALANCE
from rcl_fast.train.config import RESUMABLE, config_of
from rcl_fast.train.experiments.tables import Column, Options, Row, Table
from rcl_fast.train.options import Config
from rcl_fast.train.runtime.wording import counted

# The options that don't change a run's figures: where things are, and how fast they are computed.
IGNORED = {
    "data": RESUMABLE["data"],
    "run": (RESUMABLE["run"] - {"precision"}) | {"output", "resume"},
}


class Setting(NamedTuple):
    """The command line's changes to a table's runs; with any of them the setting is not the paper's."""

    dataset: str | None = None
    epochs: int | None = None
    validate_on: str | None = None
    more: tuple[str, ...] = ()  # any options of train/run.py, as given

    def words(self, table: Table) -> list[str]:
        """Returns the differences from the paper's setting, in words."""
        replaced = self.dataset is not None and self.dataset not in _datasets(table)
        texts = {
            "epochs": counted(range(self.epochs or 0), "epoch"),
            "validate_on": f"--validate-on {self.validate_on}",
            "more": shlex.join(self.more),
        }
        return [f"{self.dataset} in place of the paper's data sets"] * replaced + [
            text for name, text in texts.items() if self.changes(table, name)
        ]

    def changes(self, table: Table, name: str) -> bool:
        """Returns whether that field changes what is computed; --more="--cuda-graph" only changes how."""
        without = self._replace(**{name: self._field_defaults[name]})
        return self != without and any(
            run_id(parsed(arguments_of(row, column, self))) != run_id(parsed(arguments_of(row, column, without)))
            for column in adapt(table, self.dataset).columns
            for row in table.rows
            if row.options is not None
        )


def adapt(table: Table, dataset: str | None) -> Table:
    """Returns the table on one data set: its columns there or, if it has none, all columns with that data set instead.

    Where the data set is replaced, the paper's numbers mean nothing and are left out.
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


def arguments_of(row: Row, column: Column, setting: Setting) -> tuple[str, ...]:
    """Returns the arguments of train/run.py, without the seed; of one that is there twice, the last counts."""
    options = {**column.options, **(row.options or {})}
    if options["dataset"].startswith("cifar"):
        options["validate_on"] = "test"  # epochs are selected there for CIFAR's published figures
    options.update({name: value for name in ("epochs", "validate_on") if (value := getattr(setting, name)) is not None})
    return (*flags(options), *setting.more)


@cache
def parsed(arguments: tuple[str, ...]) -> Config:
    """Returns the parsed arguments. They are cached: parsing takes longest, and tables ask for the same again."""
    return config_of(arguments)


def flags(options: Options) -> list[str]:
    """Returns the options as arguments of the command line."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def run_id(config: Config) -> str:
    """Returns the name of what a run computes: a hash of the resolved configuration without the options in IGNORED.

    Options at their class's default are left out, so that a new option changes no name. Where such a default changes,
    `check_saved` sees it.
    """
    values = {
        f"{section}.{name}": value
        for section, options in config.to_dict().items()
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
