"""A run's epochs: train, validate, save."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcl_fast import LDAM, metrics
from rcl_fast.train.data.manifest import verify_command
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.errors import NonFiniteLoss, Preempted
from rcl_fast.train.loaders.base import Batch, Loader, loader_state
from rcl_fast.train.loop.evaluation import evaluate
from rcl_fast.train.loop.loss_readback import ADVICE, LossReadback
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.loop.step import Step, train_step
from rcl_fast.train.loop.training import Training
from rcl_fast.train.network.objective import compress, reweights, starts_compression
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.rundir.logs import Log
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.signals import never

_logger = logging.getLogger(__name__)


def fit(
    training: Training,
    training_loader: Loader,
    validation_loader: Loader,
    folder: Path,
    log: Log,
    should_stop: Callable[[], bool] = never,
    step: Step | None = None,
) -> None:
    """Trains to the last epoch; after each, validates and writes last.pt, best.pt where it is the best, and the log.

    Within an epoch, mid_epoch.pt is written every checkpoint_minutes, and where `should_stop` says that a signal came.
    A KeyboardInterrupt passes through; last.pt is then from the last whole epoch.

    Args:
        step: what makes a step, in place of `train_step`.

    Raises:
        Preempted: `should_stop` was true on some process; mid_epoch.pt is written.
        NonFiniteLoss, BadImage: the checkpoints are as they were.
        NotWritten: a checkpoint can't be written.
    """
    checkpointer = _Checkpointer(training, training_loader, folder)
    if training.epoch == 0 and training.progress is None:
        checkpointer.after_epoch(is_best=False)
    elif training.progress is None and 0 < training.best_epoch == training.epoch:
        checkpointer.best()  # a stop may have come between last.pt and best.pt
    while training.epoch < training.config.optimization.epochs:
        if training.progress is None:
            _begin_epoch(training)
        row = {"epoch": training.epoch + 1, "learning_rate": training.optimizer.param_groups[0]["lr"]}
        scale = training.scaler.get_scale()
        row.update(train_epoch(training, training_loader, log, checkpointer, should_stop, step))
        _check_weights(training)
        _check_scale(training, scale)
        try:
            evaluation = evaluate(
                training.model,
                validation_loader,
                len(training.class_counts),
                training.runtime,
                should_stop=should_stop,
            )
        except Preempted:
            checkpointer.within_epoch()
            raise
        training.class_accuracy = metrics.per_class_accuracy(evaluation.confusion)
        row.update(metrics.summary(evaluation.confusion, training.group_counts, evaluation.reliability))
        _step_schedule(training)
        is_best = training.end_epoch(row)
        checkpointer.after_epoch(is_best)
        with checkpoints.writing(folder):
            log.epoch_ended(training.history, is_best)
    distributed.run_on_main(lambda: checkpoints.remove_mid_epoch(folder))


class _Checkpointer:
    """What writes the checkpoints of one `fit`. All methods but `is_due` are collectives."""

    def __init__(self, training: Training, training_loader: Loader, folder: Path) -> None:
        self._training = training
        self._loader = training_loader
        self._folder = folder
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

    def is_due(self) -> bool:
        """Returns whether checkpoint_minutes have passed, by the main process's clock."""
        minutes = self._training.config.run.checkpoint_minutes
        return distributed.is_main() and time.monotonic() - self._saved >= 60 * minutes

    def _state(self) -> dict[str, Any]:
        progress = self._training.progress
        step = 0 if progress is None else progress.steps
        return {**self._training.state_dict(), "loader": loader_state(self._loader, self._training.epoch, step)}

    def _write(self, name: str, state: dict[str, Any], previous: str | None = None) -> None:
        before = None if previous is None else self._folder / previous
        distributed.run_on_main(lambda: checkpoints.save(self._folder / name, state, before))
        self._saved = time.monotonic()


def _step_schedule(training: Training) -> None:
    with warnings.catch_warnings():
        # Where a run resumes after the last step of an epoch, the optimiser's steps were made by another process.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        training.schedule.step()


def _begin_epoch(training: Training) -> None:
    if starts_compression(training.config, training.epoch) and training.class_accuracy is not None:
        note = f"Compression from epoch {training.epoch + 1}: {compress(training.objective, training.class_accuracy)}."
        training.notes.append(note)
        _logger.info(note)
    cross_entropy = training.objective.cross_entropy
    if isinstance(cross_entropy, LDAM) and reweights(training.config, training.epoch):
        cross_entropy.reweight()


def _check_weights(training: Training) -> None:
    """Raises NonFiniteLoss for a weight that is not finite: the gradient of a finite loss need not be finite."""
    weights = [tensor for tensor in training.model.state_dict().values() if tensor.is_floating_point()]
    if not torch.stack([tensor.isfinite().all() for tensor in weights]).all():
        raise NonFiniteLoss(
            f"the weights are not finite after epoch {training.epoch + 1}, though its losses are. {ADVICE}"
        )


def _check_scale(training: Training, before: float) -> None:
    """Logs how many updates fp16's scaling of the loss has left out since the scale was `before`; each makes it less.

    Raises NonFiniteLoss where the scale is 0: then no step changes the weights any more.
    """
    after = training.scaler.get_scale()
    if after == 0:
        raise NonFiniteLoss(
            f"gradients in fp16 are not finite in epoch {training.epoch + 1}, however small the loss is made: every "
            f"update is left out. {ADVICE}"
        )
    if after < before:
        least = round(math.log(before / after, 1 / training.scaler.get_backoff_factor()))
        steps = 0 if training.progress is None else training.progress.steps
        _logger.info(
            f"fp16: at least {least} of the {steps} updates of epoch {training.epoch + 1} were left out, as gradients "
            f"overflowed: the loss was scaled by {before:,g}, and is by {after:,g} now. In a run's first steps that is "
            "usual"
        )


class Agreement(NamedTuple):
    """What all processes do next."""

    images: int  # of the next step, in all processes together
    ends: bool  # the epoch ends: one process has no more batches
    skips: bool  # no process makes this step: all images of one process's share are bad
    saves: bool  # a checkpoint is written first
    stops: bool  # after that the run stops: a signal came to a process


def sync_step(batch: Batch | None, stop: bool, save: bool) -> Agreement:
    """All-reduces images and flags before a step, on this batch; returns what all processes do next."""
    images = 0 if batch is None else len(batch.labels)
    total, ended, without, stops, saves = distributed.all_reduce_counts(images, batch is None, images == 0, stop, save)
    return Agreement(total, ends=ended > 0, skips=without > 0, saves=stops + saves > 0, stops=stops > 0)


def train_epoch(
    training: Training,
    training_loader: Loader,
    log: Log,
    checkpointer: _Checkpointer | None = None,
    should_stop: Callable[[], bool] = never,
    step: Step | None = None,
) -> dict[str, float]:
    """Makes one pass over the training images, or the rest of one.

    Returns the mean of each loss part, images a second of all processes, and the share of time spent waiting for data.

    Raises:
        NonFiniteLoss: raised some steps late, so that reading a loss never makes a GPU wait.
        Preempted: `should_stop` was true on some process; the `checkpointer` has saved.
        BadImage: every step was left out.
    """
    training.ddp_model.train()
    step = step or train_step
    progress = training.progress = training.progress or Progress()
    batches = training_loader.epoch(training.epoch, start=progress.steps)
    losses = LossReadback(progress, training.epoch)
    seconds_before, began = progress.seconds, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        progress.waiting += time.perf_counter() - asked
        agreed = sync_step(batch, should_stop(), checkpointer is not None and checkpointer.is_due())
        if agreed.saves or agreed.ends:
            losses.read_all()
        progress.seconds = seconds_before + time.perf_counter() - began
        if checkpointer is not None and agreed.saves:
            checkpointer.within_epoch()
        if agreed.stops:
            raise Preempted
        if batch is None or agreed.ends:
            break
        if agreed.skips:
            progress.skipped += 1
        else:
            losses.add(step(training, batch), batch, agreed.images)
            progress.images += agreed.images
        progress.steps += 1  # a skipped one too, as the loader counts them
        log.step_ended(training.epoch, training_loader.steps_per_epoch, progress.means(), progress.images_per_second())
    _check_images(training, progress)
    return {
        **progress.means(),
        "images_per_second": progress.images_per_second(),
        "waiting_for_data": progress.waiting / progress.seconds,
    }


def _check_images(training: Training, progress: Progress) -> None:
    """Logs how many steps of an epoch were left out for their bad images. Raises BadImage where all were."""
    epoch, data = training.epoch + 1, training.config.data
    if progress.images == 0:
        raise BadImage(
            f"no step of epoch {epoch} has an image to train on: in all {progress.steps} every image of a process's "
            f"share is bad, and left out. See what is wrong with them: "
            f"{verify_command(data.dataset, data.data, data.manifest)}"
        )
    if progress.skipped:
        _logger.info(
            f"epoch {epoch}: {progress.skipped} of {progress.steps} steps were left out, as every image of a process's "
            "share is bad"
        )
