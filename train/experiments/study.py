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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.rundir import status

Parameters = Mapping[str, Any]
"""Options of train/run.py by name."""

OVER = ("finished", "diverged")
"""What status.json says of a run that is not to be gone on with."""


class Trial(NamedTuple):
    """One point of the search."""

    number: int
    parameters: dict[str, Any]
    folder: Path

    @property
    def status(self) -> str | None:
        """Returns what became of its run, as status.json has it; None: it has not begun."""
        return status.read(self.folder)

    @property
    def is_over(self) -> bool:
        """Returns whether nothing is left to run: it is finished, or its loss diverged."""
        return self.status in OVER


def open_study(folder: Path, content: dict[str, Any]) -> None:
    """Makes a study, or joins the one that is there.

    Args:
        content: what all its trials have in common, plain values.

    Raises:
        UserError: the folder holds another study, or something else.
        NotWritten: it can't be made.
    """
    file = folder / "study.json"
    if folder.is_file():
        raise UserError(
            f"--study {folder}: that file is a study of an earlier version, which kept Optuna's journal, and can't be "
            f"gone on with. Its trials are runs in {folder.with_name(folder.stem + '-trials')}/, which are readable as "
            "ever. Name a new folder"
        )
    if not file.is_file():
        if folder.is_dir() and any(not inside.name.startswith(".") for inside in folder.iterdir()):
            raise UserError(f"--study {folder}: the folder holds no study but is not empty; name another")
        _make(file, json.dumps(content, indent=2) + "\n")
    before, now = _flat(_read(file)), _flat(json.loads(json.dumps(content)))
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
    """Returns the study's trials by number."""
    files = sorted(folder.glob("[0-9]*/trial.json"))
    return [Trial(int(file.parent.name), _read(file)["parameters"], file.parent) for file in files]


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
    """Returns the content of a file of the study. Raises UserError where it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): move it away") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no study's: move it away")
    return content


def best_validation(folder: Path) -> dict[str, Any]:
    """Returns the row of a run's metrics.jsonl with the highest balanced accuracy, the first of several."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(rows, key=lambda row: row["balanced_accuracy"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
