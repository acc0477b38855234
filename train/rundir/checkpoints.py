"""Checkpoints: written atomically, checked when read, never executed. Those of whole epochs have two generations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcl_fast.train.errors import NotFound, NotWritten, UserError
from rcl_fast.train.rundir.checkpoint_files import BEST, LAST, MID_EPOCH, PREVIOUS, damage

_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"

_NONE = type(None)
_LOADER = {"loader": dict, "loader.epoch": int, "loader.step": int, "loader.identity": dict}
# The parts of a run's checkpoint and the type of each; a checkpoint of the first trainers does not say what it is of.
_PARTS_AT_FIRST: dict[str, type | tuple[type, ...]] = {"model": dict, **_LOADER}
_PARTS: dict[str, type | tuple[type, ...]] = {
    **_PARTS_AT_FIRST,
    **dict.fromkeys(("of", "objective", "optimizer", "optimizer.state", "schedule", "scaler"), dict),
    **dict.fromkeys(("optimizer.param_groups", "history", "notes", "random_states"), list),
    **dict.fromkeys(("epoch", "best_epoch"), int),
    **dict.fromkeys(("compression", "class_accuracy"), (Tensor, _NONE)),
    "class_counts": Tensor,
    "best_accuracy": (float, int),
    "progress": (dict, _NONE),
}


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
    except RuntimeError as error:  # torch raises it where a write fails, and where Ctrl-C comes in one
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
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
    """Reads a checkpoint, of a run or a second stage, onto the CPU; raises UserError with what is wrong with the file.

    That of a run, which says what it is of, has all its parts.
    """
    try:
        state = _read(path)
        if isinstance(state, dict) and "of" in state:
            _check_parts(state)
    except Damaged as error:
        raise UserError(f"{path} can't be read as a checkpoint ({error}); is it damaged?") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of a run: it has no weights of a model")
    return state


def newest(folder: Path, unfit: Mapping[Path, str] = MappingProxyType({})) -> Found:
    """Returns the newest intact checkpoint. Raises NotFound without any, UserError where none can be used.

    Args:
        unfit: checkpoints that can't be used though they are intact, and why; they count as damaged.
    """
    return _newest(folder, (MID_EPOCH, LAST, PREVIOUS), unfit)


def last_epoch(folder: Path) -> Found:
    """Returns the newest intact checkpoint of a whole epoch. Raises as `newest`."""
    return _newest(folder, (LAST, PREVIOUS), {})


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


def _newest(folder: Path, names: tuple[str, ...], unfit: Mapping[Path, str]) -> Found:
    intact: dict[Path, dict[str, Any]] = {}
    damaged = dict(unfit)
    for path in (folder / name for name in names):
        if not path.exists() or (path.name == PREVIOUS and folder / LAST in intact):  # always older than LAST
            continue
        if path not in damaged:
            try:
                intact[path] = _read(path)
                _check_parts(intact[path])
            except Damaged as error:
                intact.pop(path, None)
                damaged[path] = str(error)
    if damaged and not intact:
        each = "; ".join(f"{path.name}: {error}" for path, error in damaged.items())
        raise UserError(
            f"none of the checkpoints in {folder} can be used: {each}. Put a copy of one there, or start anew; nothing "
            "was written"
        )
    if not intact:
        raise NotFound(f"no checkpoint {folder / LAST}; a run writes it before its first epoch and after each")
    path = max(intact, key=lambda path: _epoch_and_step(intact[path]))
    return Found(intact[path], path, damaged)


def _epoch_and_step(state: dict[str, Any]) -> tuple[int, int]:
    return state["loader"]["epoch"], state["loader"]["step"]


def _read(path: Path) -> Any:
    """Reads a file that `save` wrote onto the CPU; raises Damaged with what is wrong with it."""
    wrong = damage(path)
    if wrong is not None:
        raise Damaged(wrong)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Damaged(str(error).partition("\n")[0] or type(error).__name__) from error


def _check_parts(state: Any) -> None:
    """Raises Damaged where a run's checkpoint lacks one of its parts, or one is of another type."""
    if not isinstance(state, dict):
        raise Damaged(f"it holds a {type(state).__name__}, not the state of a run")
    wrong = []
    for name, kind in (_PARTS if "of" in state else _PARTS_AT_FIRST).items():
        *above, key = name.split(".")
        holder = state.get(above[0]) if above else state
        if not isinstance(holder, dict):  # which is said of the part above
            continue
        if key not in holder:
            wrong.append(f"it lacks {name}")
        elif not isinstance(holder[key], kind):
            wrong.append(f"its {name} is a {type(holder[key]).__name__}")
    if wrong:
        raise Damaged(", ".join(wrong))
