"""Checkpoints: written atomically, checked when read, never executed. Those of whole epochs have two generations."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcl_fast.train.errors import NotFound, NotWritten, UserError
from rcl_fast.train.rundir.checkpoint_files import BEST, LAST, MID_EPOCH, PREVIOUS

_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"


class Damaged(Exception):
    """A file that can't be read as a checkpoint; the message says why."""


class Found(NamedTuple):
    """An intact checkpoint and its file, and the damaged ones with what is wrong with each."""

    state: dict[str, Any]
    path: Path
    damaged: dict[Path, str]


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes tensors and plain values atomically: `path` is the old file or the new one, never half of one.

    `previous`: the new name of the old file. Between the two renames there is `previous` but, for an instant, no
    `path`. Raises NotWritten where the state can't be written; the old files are then as they were.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    with writing(path.parent):
        try:
            with unfinished.open("wb") as file:
                _write(state, file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(unfinished, path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise
        _sync_folder(path.parent)


def _write(state: dict[str, Any], file: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch raises it where a write fails
        raise OSError(f"PyTorch could not write it: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Makes the renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems sync no folders
        pass
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an OSError into NotWritten, which says what failed, what is still there, and how to go on."""
    try:
        yield
    except OSError as error:
        there = ", ".join(name for name in (MID_EPOCH, LAST, PREVIOUS, BEST) if (folder / name).exists())
        kept = f"What was saved before is as it was: {there}." if there else "No checkpoint was written yet."
        then = f"go on with --resume {folder}" if there else "start again"
        raise NotWritten(
            f"the results can't be written to {folder} ({error}). {kept} "
            f"Free space there or make it writable, then {then}"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; raises UserError with what is wrong with the file."""
    try:
        return _read(path)
    except Damaged as error:
        raise UserError(f"{path} can't be read as a checkpoint ({error}); is it damaged?") from error


def newest(folder: Path) -> Found:
    """Returns the newest intact checkpoint. Raises NotFound without any, UserError where all are damaged."""
    return _newest(folder, (MID_EPOCH, LAST, PREVIOUS))


def last_epoch(folder: Path) -> Found:
    """Returns the newest intact checkpoint of a whole epoch. Raises as `newest`."""
    return _newest(folder, (LAST, PREVIOUS))


def set_aside(damaged: dict[Path, str]) -> None:
    """Renames damaged checkpoints, so that none ever replaces an intact PREVIOUS."""
    for path in damaged:
        with writing(path.parent):
            os.replace(path, path.with_name(path.name + _DAMAGED))


def remove_mid_epoch(folder: Path) -> None:
    """Removes MID_EPOCH at the end of training, when no epoch is under way."""
    with writing(folder):
        (folder / MID_EPOCH).unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed run had begun to write."""
    for path in folder.glob("*" + _UNFINISHED):
        path.unlink()


def _newest(folder: Path, names: tuple[str, ...]) -> Found:
    intact: dict[Path, dict[str, Any]] = {}
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in names):
        if not path.exists() or (path.name == PREVIOUS and folder / LAST in intact):  # always older than LAST
            continue
        try:
            intact[path] = _read(path)
        except Damaged as error:
            damaged[path] = str(error)
    if damaged and not intact:
        each = "; ".join(f"{path.name}: {error}" for path, error in damaged.items())
        raise UserError(f"none of the checkpoints in {folder} can be read: {each}")
    if not intact:
        raise NotFound(f"no checkpoint {folder / LAST}; a run writes it before its first epoch and after each")
    path = max(intact, key=lambda path: _epoch_and_step(intact[path]))
    return Found(intact[path], path, damaged)


def _epoch_and_step(state: dict[str, Any]) -> tuple[int, int]:
    return state["loader"]["epoch"], state["loader"]["step"]


def _read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; raises Damaged with what is wrong with the file."""
    if not path.is_file():
        raise Damaged("there is no such file")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load would not notice a flipped bit
            wrong = file.testzip()
        if wrong is not None:
            raise Damaged(f"the checksum of {wrong} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise Damaged(str(error).partition("\n")[0] or type(error).__name__) from error
