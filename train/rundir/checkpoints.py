"""Checkpoints: written atomically, checked when read, never executed; whole epochs in two generations."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

LAST = "last.pt"
"""After the last whole epoch."""
PREVIOUS = "previous.pt"
"""What LAST was before: the one to go on from where LAST turns out damaged."""
MID_EPOCH = "mid_epoch.pt"
"""Between two steps: every few minutes, and where a signal stopped the run."""
BEST = "best.pt"
"""After the epoch that was best on validation."""

_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"


class Damaged(Exception):
    """A file that can't be read as a checkpoint; the message says why."""


class Found(NamedTuple):
    """A checkpoint that is whole, the file it is in, and the newer ones that are not, with what is wrong with each."""

    state: dict[str, Any]
    path: Path
    damaged: dict[Path, str]


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write tensors and plain values so that `path` is at any moment the old file or the new one, never half of one.

    `previous`: what the old file becomes. In the instant between the two renames there is no `path`, only `previous`.
    Raises SystemExit where it can't be written; the old files are then as they were.
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
    except RuntimeError as error:  # what torch makes of a write that fails
        raise OSError(f"PyTorch could not write it: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Make the renames durable, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems sync no folders
        pass
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes of an OSError inside a SystemExit for people: what failed, what is still there, how to go on."""
    try:
        yield
    except OSError as error:
        there = ", ".join(name for name in (MID_EPOCH, LAST, PREVIOUS, BEST) if (folder / name).exists())
        kept = f"What was saved before is as it was: {there}." if there else "No checkpoint was written yet."
        then = f"go on with --resume {folder}" if there else "start again"
        raise SystemExit(
            f"the results can't be written to {folder} ({error}). {kept} "
            f"Free space there or make it writable, then {then}"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises SystemExit with what is wrong with the file."""
    try:
        return _read(path)
    except Damaged as error:
        raise SystemExit(f"{path} can't be read as a checkpoint ({error}); is it damaged?") from error


def newest(folder: Path) -> Found:
    """The newest checkpoint of a run that is whole; raises SystemExit where there is none."""
    return _newest(folder, (MID_EPOCH, LAST, PREVIOUS))


def last_epoch(folder: Path) -> Found:
    """The same, of those after a whole epoch."""
    return _newest(folder, (LAST, PREVIOUS))


def exist(folder: Path) -> bool:
    """Whether a run can go on from here, or could if nothing is damaged."""
    return any((folder / name).exists() for name in (MID_EPOCH, LAST, PREVIOUS))


def set_aside(damaged: dict[Path, str]) -> None:
    """Rename damaged checkpoints, so that none of them ever takes the place of a good PREVIOUS."""
    for path in damaged:
        with writing(path.parent):
            os.replace(path, path.with_name(path.name + _DAMAGED))


def remove_mid_epoch(folder: Path) -> None:
    """At the end of training, when no epoch is under way."""
    with writing(folder):
        (folder / MID_EPOCH).unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run had begun to write."""
    for path in folder.glob("*" + _UNFINISHED):
        path.unlink()


def _newest(folder: Path, names: tuple[str, ...]) -> Found:
    whole: dict[Path, dict[str, Any]] = {}
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in names):
        if not path.exists() or (path.name == PREVIOUS and folder / LAST in whole):  # always older than LAST
            continue
        try:
            whole[path] = _read(path)
        except Damaged as error:
            damaged[path] = str(error)
    if not whole:
        raise SystemExit(
            f"none of the checkpoints in {folder} can be read: "
            + "; ".join(f"{path.name}: {error}" for path, error in damaged.items())
            if damaged
            else f"no checkpoint {folder / LAST}; a run writes it before its first epoch and after each"
        )
    path = max(whole, key=lambda path: _position(whole[path]))
    return Found(whole[path], path, damaged)


def _position(state: dict[str, Any]) -> tuple[int, int]:
    return state["loader"]["epoch"], state["loader"]["step"]


def _read(path: Path) -> dict[str, Any]:
    """Raises Damaged."""
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
