"""A study: what a sweep searches, and its trials, each a run in a folder of the study's.

The folders are the whole state. study.json says what the trials have in common, STUDY/0000/trial.json what one of them
has of its own, and the run beside it how far it is. So any process that sees the folder can go on with the study, and
several may share it: a trial is made by renaming a folder, which only one process can do.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rcl_fast.train.checks import check_results_folder
from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.rundir import status
from rcl_fast.train.rundir.result_files import METRICS, read_history, read_json, read_metrics

Parameters = Mapping[str, Any]
"""Options of train/run.py by name."""

OVER = ("finished", "diverged", "damaged")
"""The statuses of trials that are not to be gone on with."""


class Trial(NamedTuple):
    """One point of the search."""

    number: int
    parameters: dict[str, Any]  # {} where its file is damaged
    folder: Path

    @property
    def status(self) -> str | None:
        """Returns what became of its run, as `status.now` has it, or "damaged"; None: it has not begun."""
        return status.now(self.folder) if self.damage() is None else "damaged"

    @property
    def is_over(self) -> bool:
        """Returns whether nothing is left to run: it is finished, its loss diverged, or a file of it is damaged."""
        return self.status in OVER

    def damage(self) -> str | None:
        """Returns which file of it is damaged, and what to do; None where none is that a search reads."""
        try:
            _read_trial(self.folder)
        except UserError as error:
            return f"{error}: move {self.folder} away, and the same command makes the trial anew"
        try:
            if status.read(self.folder) == "finished":
                best_validation(self.folder)
                read_metrics(self.folder)
        except UserError as error:
            return f"{error}: {_remade(self.folder)}"
        return None


def _remade(folder: Path) -> str:
    return f"train/run.py --resume {folder} makes it anew"


class Figures(NamedTuple):
    """What a finished trial reached."""

    validation: float  # balanced accuracy of the best epoch
    epoch: int | None  # the best
    test: float | None
    selected_on: str


def results(of: Sequence[Trial]) -> tuple[dict[int, Figures], dict[int, str]]:
    """Returns by number the figures of the finished trials, and what is wrong with those that are damaged."""
    found, wrong = {}, {}
    for trial in of:
        why = trial.damage()
        if why is None and status.read(trial.folder) == "finished":
            metrics = read_metrics(trial.folder)
            if metrics:
                best = best_validation(trial.folder)["balanced_accuracy"]
                shown = metrics.get("best_epoch"), metrics["balanced_accuracy"], str(metrics.get("selected_on"))
                found[trial.number] = Figures(best, *shown)
            else:
                why = f"{trial.folder / METRICS} is not there: {_remade(trial.folder)}"
        if why is not None:
            wrong[trial.number] = why
    return found, wrong


def check_place(folder: Path, data: Path | None) -> None:
    """Raises UserError where no study can be kept, or where it would lie among the images of the data."""
    if _is_journal(folder):
        raise UserError(
            f"--study {folder}: that file is a study of an earlier version, which kept Optuna's journal, and can't be "
            f"gone on with. Its trials are runs in {folder.with_name(folder.stem + '-trials')}/, which are readable as "
            "ever. Name a new folder"
        )
    check_results_folder("--study", folder, data)


def _is_journal(path: Path) -> bool:
    """Returns whether a file is Optuna's journal, which begins with an operation as JSON."""
    try:
        with path.open(encoding="utf-8") as file:
            return "op_code" in json.loads(file.readline())
    except (OSError, ValueError, TypeError):
        return False


def open_study(folder: Path, content: dict[str, Any]) -> None:
    """Makes a study, or joins the one that is there.

    Args:
        content: what all its trials have in common, plain values.

    Raises:
        UserError: the folder holds another study, or something else.
        NotWritten: it can't be made.
    """
    file = folder / "study.json"
    if not file.is_file():
        if folder.is_dir() and any(not inside.name.startswith(".") for inside in folder.iterdir()):
            raise UserError(f"--study {folder}: the folder holds no study but is not empty; name another")
        _make(file, json.dumps(content, indent=2) + "\n")
    try:
        before = _flat(_read(file))
    except UserError as error:
        raise UserError(
            f"--study {folder}: {error}, so what it searches is lost. Name another folder; its trials are runs, which "
            "stay readable"
        ) from error
    now = _flat(json.loads(json.dumps(content)))
    differing = [
        f"{name} (was {before.get(name)}, now {now.get(name)})"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"--study {folder} is of another sweep: {', '.join(differing)}. Name another folder, or give the same "
            "options"
        )


def trials(folder: Path) -> list[Trial]:
    """Returns the study's trials by number, damaged ones too."""
    places = sorted(place for place in folder.glob("[0-9]*") if place.name.isdecimal() and any(place.iterdir()))
    return [Trial(int(place.name), _parameters(place), place) for place in places]


def _parameters(place: Path) -> dict[str, Any]:
    try:
        return _read_trial(place)
    except UserError:
        return {}


def _read_trial(place: Path) -> dict[str, Any]:
    parameters = _read(place / "trial.json").get("parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"{place / 'trial.json'} is damaged (it has no parameters)")
    return parameters


def make_trial(folder: Path, number: int, parameters: Parameters) -> Trial | None:
    """Makes trial `number`; None where it is there already, perhaps since a moment ago, by another process.

    Raises NotWritten where it can't be made.
    """
    place, unfinished = folder / f"{number:04d}", folder / f".trial-{_own_name()}"
    try:
        unfinished.mkdir(exist_ok=True)
        (unfinished / "trial.json").write_text(json.dumps({"parameters": dict(parameters)}) + "\n", encoding="utf-8")
        os.rename(unfinished, place)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if place.is_dir():
            return None
        raise NotWritten(f"--study {folder}: trial {number} can't be made there ({error})") from error
    return Trial(number, dict(parameters), place)


def _make(file: Path, text: str) -> None:
    """Writes a file unless it is there; of several processes that do, one wins, and none ever reads half of it."""
    unfinished = file.with_name(f".{file.name}-{_own_name()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        with suppress(FileExistsError):
            os.link(unfinished, file)
        unfinished.unlink()
    except OSError as error:
        raise NotWritten(f"--study {file.parent}: the study can't be written there ({error})") from error


def _own_name() -> str:
    """Returns a name that no other process has, on whichever machine."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _read(file: Path) -> dict[str, Any]:
    """Returns the content of a file of the study. Raises UserError where it is damaged or not there."""
    if not file.is_file():
        raise UserError(f"{file} is not there")
    return read_json(file)


def best_validation(folder: Path) -> dict[str, Any]:
    """Returns the row of a run's epoch with the highest balanced accuracy, the first of several. Raises UserError."""
    return max(read_history(folder), key=lambda row: row["balanced_accuracy"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
