"""The folder of a run: claimed before any work, gone on from, or made. One process at a time writes there."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from rcl_fast.train.checks import check_results_folder
from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.loaders.base import Loader, StateMismatch
from rcl_fast.train.loop.resuming import Unfit, check_weights, resume_training
from rcl_fast.train.loop.training import Training
from rcl_fast.train.options import Config
from rcl_fast.train.rundir import checkpoint_files, checkpoints, restarts, status, writer
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.files import write_text

_logger = logging.getLogger(__name__)

RUNS = Path("runs")
"""Where the folder of a run is made, unless --output names one."""


def claim(config: Config, ends: ExitStack) -> None:
    """Locks the folder of a run to go on with, before a checkpoint is read; checks that a new one can be made.

    Raises UserError.
    """
    folder = config.run.resume
    if folder is None:
        if config.run.output is None:
            _check_default(config)
        else:
            _check_new(config.run.output)
        return
    ends.enter_context(writer.only_writer(folder))
    if status.read(folder) == "diverged":
        _logger.warning(
            f"{folder} diverged: with the same options it is likely to do so again. Only --precision may change, like "
            "--precision fp32; a lower --lr or more --warmup-epochs are another run"
        )


def _check_default(config: Config) -> None:
    """Raises UserError where runs/ can't be written to, or would be a class among those of an image folder."""
    data = config.data.data if config.data.dataset == "folder" else None
    for part in () if data is None else (data / "train", data / "val", data / "test"):
        check_results_folder(_DEFAULT, RUNS, part)
    check_results_folder(_DEFAULT, RUNS)


_DEFAULT = "without --output, the results' folder"


def _check_new(folder: Path) -> None:
    if checkpoint_files.exist(folder):
        raise UserError(f"--output {folder} already holds a run: go on with --resume {folder}, or name another folder")
    if (folder / checkpoints.BEST).exists():
        raise UserError(f"--output {folder} already holds a network, {checkpoints.BEST}: name another folder")


def go_on(training: Training, training_loader: Loader, folder: Path) -> None:
    """Loads the newest checkpoint in the folder that fits. Nothing is written to the folder unless all checks pass."""
    unfit: dict[Path, str] = {}
    while True:
        newest = distributed.run_on_main(lambda: checkpoints.newest(folder, unfit))
        try:
            resume_training(training, training_loader, newest.state)
        except Unfit as error:
            unfit[newest.path] = str(error)
        except StateMismatch as error:
            raise UserError(
                f"--resume {folder}: {error}. A run goes on with as many processes, and the loader, images and "
                "versions that it began with; nothing was written"
            ) from error
        else:
            break
    distributed.run_on_main(lambda: _check_best(training, folder))
    for path, what in newest.damaged.items():
        _logger.info(f"{path} is damaged ({what}): going on from the one before, {newest.path.name}")
    distributed.run_on_main(lambda: checkpoints.set_aside(newest.damaged))


def best_weights(training: Training, folder: Path) -> dict[str, Tensor]:
    """Returns the weights of the best epoch, from best.pt. Raises UserError where that file does not have them."""
    path = folder / checkpoints.BEST
    state = checkpoints.load(path)
    if state.get("epoch") != training.best_epoch:  # from before a damaged checkpoint took the run back
        raise UserError(f"{path} has the weights of epoch {state.get('epoch')}")
    try:
        check_weights(state["model"], training.model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return state["model"]


def _check_best(training: Training, folder: Path) -> None:
    """Warns where the weights of the best epoch so far are lost: at the end they may have to be tested."""
    if training.best_epoch == 0 or (training.best_epoch == training.epoch and training.progress is None):
        return  # there is none yet, or it is the one that was loaded, and is written again
    try:
        best_weights(training, folder)
    except UserError as error:
        _logger.warning(
            f"the weights of the best epoch so far, {training.best_epoch}, are lost: {error}. Put a copy there: "
            "else the run can only be tested where a later epoch is better"
        )


def make(config: Config, ends: ExitStack) -> Path:
    """Makes the folder of a new run and locks it, and writes the resolved configuration there."""
    with _writable():
        folder = config.run.output or _new_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if config.run.resume is None:
            ends.enter_context(writer.only_writer(folder))
            _check_new(folder)  # another run may have begun there meanwhile, and ended
        checkpoints.clear_unfinished(folder)
        write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        status.write(folder, "running")
        restarts.remember(folder)
    return folder


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritten(f"the results can't be written ({error}); choose another folder with --output") from error


def _new_folder(config: Config) -> Path:
    """Makes runs/DATASET-LOSS-ARCH-TIME, with a number added where another run of the same second has that name."""
    name = f"{config.data.dataset}-{config.loss.loss}-{config.model.arch}".replace("/", "-")
    base = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")
