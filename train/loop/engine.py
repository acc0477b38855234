"""A run's epochs: train, validate, save."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcl_fast import LDAM, metrics
from rcl_fast.train.loaders import base
from rcl_fast.train.loaders.base import Loader
from rcl_fast.train.loop.evaluation import evaluate
from rcl_fast.train.loop.loss_readback import ADVICE, NonFiniteLoss, StepLosses
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.loop.step import Step, train_step
from rcl_fast.train.loop.training import Training
from rcl_fast.train.network.objective import compress, reweights, starts_compression
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.rundir.logs import Log
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.signals import Preempted, never


def fit(
    training: Training,
    training_loader: Loader,
    validation_loader: Loader,
    folder: Path,
    log: Log,
    stopping: Callable[[], bool] = never,
    step: Step | None = None,
) -> None:
    """Train to the last epoch; after each, validate and write last.pt, best.pt where it is the best, and the log.

    Within an epoch mid_epoch.pt is written every checkpoint_minutes, and where `stopping` says that a signal came. A
    KeyboardInterrupt passes through; last.pt is then that of the last whole epoch.

    Raises:
        Preempted: `stopping` on any process; mid_epoch.pt is written.
        NonFiniteLoss, BadImage: the checkpoints are then those from before.
        SystemExit: a checkpoint can't be written.
    """
    saving = _Saving(training, training_loader, folder, stopping)
    if training.epoch == 0 and training.progress is None:
        saving.after_epoch(is_best=False)
    elif training.progress is None and 0 < training.best_epoch == training.epoch:
        saving.best()  # a stop may have come between last.pt and best.pt
    while training.epoch < training.config.optimization.epochs:
        if training.progress is None:
            _begin_epoch(training, log)
        row = {"epoch": training.epoch + 1, "learning_rate": training.optimizer.param_groups[0]["lr"]}
        row.update(train_epoch(training, training_loader, log, saving, step))
        _check_weights(training)
        try:
            evaluation = evaluate(
                training.model, validation_loader, len(training.class_counts), training.machine, stopping=stopping
            )
        except Preempted:
            saving.within_epoch()
            raise
        training.class_accuracy = metrics.per_class_accuracy(evaluation.confusion)
        row.update(metrics.summary(evaluation.confusion, training.group_counts, evaluation.reliability))
        _step_schedule(training)
        training.epoch += 1
        training.progress = None
        training.history.append(row)
        is_best = row["balanced_accuracy"] > training.best_accuracy
        if is_best:
            training.best_epoch, training.best_accuracy = training.epoch, row["balanced_accuracy"]
        saving.after_epoch(is_best)
        with checkpoints.writing(folder):
            log.epoch_ended(training.history, is_best)
    distributed.on_main(lambda: checkpoints.remove_mid_epoch(folder))


class _Agreed(NamedTuple):
    """What all processes do next."""

    images: int  # of the next step, of all together
    ends: bool  # the epoch: one of them has no more
    saves: bool  # first
    stops: bool  # after that: a signal came to one of them


class _Saving:
    """When and where the checkpoints of one `fit` are written. Its methods are for all processes to call together."""

    def __init__(self, training: Training, training_loader: Loader, folder: Path, stopping: Callable[[], bool]) -> None:
        self._training = training
        self._loader = training_loader
        self._folder = folder
        self._stopping = stopping
        self._saved = time.monotonic()

    def after_epoch(self, is_best: bool) -> None:
        state = self._state()
        self._write(checkpoints.LAST, state, previous=checkpoints.PREVIOUS)
        if is_best:
            self._write(checkpoints.BEST, state)

    def best(self) -> None:
        self._write(checkpoints.BEST, self._state())

    def within_epoch(self) -> None:
        _check_weights(self._training)
        self._write(checkpoints.MID_EPOCH, self._state())

    def agree(self, images: int) -> _Agreed:
        minutes = self._training.config.run.checkpoint_minutes
        due = distributed.is_main() and time.monotonic() - self._saved >= 60 * minutes
        together, without, stop, due_somewhere = distributed.totals(images, images == 0, self._stopping(), due)
        return _Agreed(together, ends=without > 0, saves=stop + due_somewhere > 0, stops=stop > 0)

    def _state(self) -> dict[str, Any]:
        progress = self._training.progress
        position = base.state(self._loader, self._training.epoch, step=0 if progress is None else progress.steps)
        return {**self._training.state_dict(), "loader": position}

    def _write(self, name: str, state: dict[str, Any], previous: str | None = None) -> None:
        before = None if previous is None else self._folder / previous
        distributed.on_main(lambda: checkpoints.save(self._folder / name, state, before))
        self._saved = time.monotonic()


def _step_schedule(training: Training) -> None:
    with warnings.catch_warnings():
        # Resumed after an epoch's last step, the optimiser made its steps in another process.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        training.schedule.step()


def _begin_epoch(training: Training, log: Log) -> None:
    if starts_compression(training.config, training.epoch) and training.class_accuracy is not None:
        note = f"Compression from epoch {training.epoch + 1}: {compress(training.objective, training.class_accuracy)}."
        training.notes.append(note)
        log.say(note)
    cross_entropy = training.objective.cross_entropy
    if isinstance(cross_entropy, LDAM) and reweights(training.config, training.epoch):
        cross_entropy.reweight()


def _check_weights(training: Training) -> None:
    """A finite loss can still have a gradient that is not; raises NonFiniteLoss."""
    weights = [tensor for tensor in training.model.state_dict().values() if tensor.is_floating_point()]
    if not torch.stack([tensor.isfinite().all() for tensor in weights]).all():
        raise NonFiniteLoss(
            f"the weights are not finite after epoch {training.epoch + 1}, though its losses are. {ADVICE}"
        )


def train_epoch(
    training: Training, training_loader: Loader, log: Log, saving: _Saving | None = None, step: Step | None = None
) -> dict[str, float]:
    """One pass over the training images, or the rest of one; the mean of each loss part, images a second of all
    processes, and the share of time in which the loader was waited for.

    Raises:
        NonFiniteLoss: found some steps late, so that reading a loss never makes a GPU wait.
        Preempted: by `saving`, which has then saved.
    """
    training.network.train()
    take_step = step or train_step
    progress = training.progress = training.progress or Progress()
    batches = training_loader.epoch(training.epoch, start=progress.steps)
    losses = StepLosses(progress, training.epoch)
    seconds_before, began = progress.seconds, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        progress.waiting += time.perf_counter() - asked
        images = 0 if batch is None else len(batch["label"])
        agreed = saving.agree(images) if saving else _Agreed(images, ends=images == 0, saves=False, stops=False)
        if agreed.saves or agreed.ends:
            losses.read_all()
        progress.seconds = seconds_before + time.perf_counter() - began
        if saving and agreed.saves:
            saving.within_epoch()
        if agreed.stops:
            raise Preempted
        if batch is None or agreed.ends:
            break
        losses.add(take_step(training, batch), batch, agreed.images)
        progress.steps += 1
        progress.images += agreed.images
        log.step_ended(training.epoch, training_loader.steps_per_epoch, progress.means(), progress.images_per_second())
    return {
        **progress.means(),
        "images_per_second": progress.images_per_second(),
        "waiting_for_data": progress.waiting / progress.seconds,
    }
