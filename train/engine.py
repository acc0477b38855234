"""Training: the state of a run, its epochs, and what is kept after each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from rcl_fast import LDAM, metrics
from rcl_fast.train import checkpoints
from rcl_fast.train.config import Config
from rcl_fast.train.data import loader
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.loader import Batch, Loader
from rcl_fast.train.evaluation import evaluate
from rcl_fast.train.logs import RunLog
from rcl_fast.train.machine import Machine
from rcl_fast.train.models import LongTailedClassifier
from rcl_fast.train.objective import Objective, compress, has_prototypes, reweights, starts_compression
from rcl_fast.train.optimization import build_optimizer, build_schedule


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message describes the batch."""


@dataclass
class Training:
    """Everything that training changes, and that a checkpoint holds."""

    config: Config
    machine: Machine
    model: LongTailedClassifier
    objective: Objective
    optimizer: SGD
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    class_counts: Tensor  # int64 [C], what is trained on
    group_counts: Tensor  # int64 [C], with what is held out: they part many, medium and few
    epoch: int = 0  # epochs done
    best_epoch: int = 0  # from 1; 0: none yet
    best_accuracy: float = -1.0
    loader_state: dict[str, Any] | None = None  # where training goes on, and in what batches
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_accuracy: Tensor | None = None  # [C] of the last validation

    def state_dict(self) -> dict[str, Any]:
        contrastive = self.objective.contrastive
        return {
            "class_counts": self.class_counts,
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "compression": None if contrastive is None else contrastive.compression,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "loader": self.loader_state,
            "history": self.history,
            "notes": self.notes,
            "class_accuracy": self.class_accuracy,
            "random_state": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; raises SystemExit where it is of another network or data set."""
        if not torch.equal(state["class_counts"], self.class_counts):
            raise SystemExit(
                f"the checkpoint's training set ({_describe_counts(state['class_counts'])}) is not this run's "
                f"({_describe_counts(self.class_counts)}): the data set has changed on disk"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise SystemExit(f"the checkpoint does not fit this network: {error}") from None
        self.objective.load_state_dict(state["objective"])
        if self.objective.contrastive is not None:
            self.objective.contrastive.set_compression(state["compression"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty where the run had no fp16, perhaps on another machine
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_epoch, self.best_accuracy = state["epoch"], state["best_epoch"], state["best_accuracy"]
        self.loader_state = state["loader"]
        self.history, self.notes, self.class_accuracy = state["history"], state["notes"], state["class_accuracy"]
        torch.set_rng_state(state["random_state"])


def start(config: Config, splits: Splits, machine: Machine) -> Training:
    """A fresh run: everything that depends on the seed is drawn here."""
    torch.manual_seed(config.run.seed)
    class_counts = torch.as_tensor(splits.class_counts)
    model = LongTailedClassifier(
        config.model, splits.num_classes, embeds=config.contrastive, has_prototypes=has_prototypes(config)
    )
    model.to(machine.device, memory_format=machine.memory_format)  # type: ignore[call-overload]  # torch's stubs lag
    if config.run.compile:
        model.backbone.compile()
    optimizer = build_optimizer(config.optimization, model)
    return Training(
        config=config,
        machine=machine,
        model=model,
        objective=Objective(config, class_counts).to(machine.device),
        optimizer=optimizer,
        schedule=build_schedule(config.optimization, optimizer),
        scaler=machine.grad_scaler(),
        class_counts=class_counts,
        group_counts=torch.as_tensor(splits.published_counts),
    )


def fit(training: Training, training_loader: Loader, validation_loader: Loader, folder: Path, log: RunLog) -> None:
    """Train to the last epoch; after each, validate and write last.pt, best.pt where it is the best, and the log.

    A KeyboardInterrupt passes through; the checkpoints are then those of the last whole epoch.

    Raises:
        StateMismatch: the loader gives other batches than those that training goes on with; nothing is written.
        NonFiniteLoss, BadImage: last.pt is then that of the epoch before.
    """
    if training.loader_state is not None:
        loader.position(training_loader, training.loader_state)
    training.loader_state = loader.state(training_loader, training.epoch, step=0)
    checkpoints.save(folder / checkpoints.LAST, training.state_dict())
    if 0 < training.best_epoch == training.epoch:
        checkpoints.save(folder / checkpoints.BEST, training.state_dict())  # a stop may have come between the two
    while training.epoch < training.config.optimization.epochs:
        _begin_epoch(training, log)
        row = {"epoch": training.epoch + 1, "learning_rate": training.optimizer.param_groups[0]["lr"]}
        row.update(train_epoch(training, training_loader, log))
        _check_weights(training)
        training.schedule.step()
        evaluation = evaluate(training.model, validation_loader, len(training.class_counts), training.machine)
        training.class_accuracy = metrics.per_class_accuracy(evaluation.confusion)
        row.update(metrics.summary(evaluation.confusion, training.group_counts))
        training.epoch += 1
        training.loader_state = loader.state(training_loader, training.epoch, step=0)
        training.history.append(row)
        is_best = row["balanced_accuracy"] > training.best_accuracy
        if is_best:
            training.best_epoch, training.best_accuracy = training.epoch, row["balanced_accuracy"]
        checkpoints.save(folder / checkpoints.LAST, training.state_dict())
        if is_best:
            checkpoints.save(folder / checkpoints.BEST, training.state_dict())
        log.epoch_ended(training.history, is_best)


def _begin_epoch(training: Training, log: RunLog) -> None:
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
            f"the weights are not finite after epoch {training.epoch + 1}, though its losses are. {_ADVICE}"
        )


_ADVICE = "A lower --lr, more --warmup-epochs or --precision fp32 often help."


def train_epoch(training: Training, training_loader: Loader, log: RunLog) -> dict[str, float]:
    """One pass over the training images; the mean of each loss part, images a second, and the share of time in which
    the loader was waited for.

    Raises:
        NonFiniteLoss: found one step late, so that reading a loss never makes a GPU wait.
    """
    training.model.train()
    means = _LossMeans(training.epoch)
    images, began = 0, time.perf_counter()
    previous: tuple[dict[str, Tensor], Batch] | None = None
    waits: list[float] = []
    for batch in _timed(training_loader.epoch(training.epoch), waits):
        current = train_step(training, batch), batch
        images += len(batch["label"])
        if previous is not None:
            means.add(*previous)
        previous = current
        log.step_ended(
            training.epoch, training_loader.steps_per_epoch, means.values(), images / (time.perf_counter() - began)
        )
    if previous is not None:
        means.add(*previous)
    seconds = time.perf_counter() - began
    return {**means.values(), "images_per_second": images / seconds, "waiting_for_data": sum(waits) / seconds}


def _timed(batches: Iterator[Batch], waits: list[float]) -> Iterator[Batch]:
    """The batches; `waits` gets the seconds that each took to come."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - began)
        if batch is None:
            return
        yield batch


def train_step(training: Training, batch: Batch) -> dict[str, Tensor]:
    """Forward, backward and one update; returns the batch's detached losses by name, on the device."""
    training.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for micro_batch in _micro_batches(batch, training.config.optimization.accumulate):
        views = [training.machine.images(micro_batch[name]) for name in ("x1", "x2", "x3") if name in micro_batch]
        labels = training.machine.labels(micro_batch["label"])
        with training.machine.autocast():
            loss = training.objective(training.model(views), labels)
        share = len(labels) / len(batch["label"])
        training.scaler.scale(loss.total * share).backward()
        for name, part in loss.parts().items():
            totals[name] = totals.get(name, 0) + part.detach() * share
    if training.config.optimization.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.config.optimization.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return totals


def _micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    names = list(batch)
    for parts in zip(*(batch[name].tensor_split(count) for name in names), strict=True):
        yield dict(zip(names, parts, strict=True))


class _LossMeans:
    """The mean of each loss part over an epoch's images."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._totals: dict[str, float] = {}
        self._images = 0

    def add(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Raises NonFiniteLoss."""
        values = {name: loss.item() for name, loss in losses.items()}
        if not math.isfinite(values["loss"]):
            raise NonFiniteLoss(_describe_batch(values, batch, self._epoch))
        self._images += len(batch["label"])
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0.0) + value * len(batch["label"])

    def values(self) -> dict[str, float]:
        return {name: total / self._images for name, total in self._totals.items()}


def _describe_batch(values: dict[str, float], batch: Batch, epoch: int) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
    images = {
        name: f"{view.min():.3g} to {view.max():.3g}" for name, view in batch.items() if name in ("x1", "x2", "x3")
    }
    labels, counts = batch["label"].unique(return_counts=True)
    return (
        f"the loss is not finite in epoch {epoch + 1}: {parts}. The batch: {len(batch['label'])} images of "
        f"{len(labels)} classes (most: class {labels[counts.argmax()].item()}, {counts.max().item()} times); pixel "
        f"ranges {images}; positions in the training set {batch['index'].tolist()}. "
        f"{_ADVICE}"
    )


def _describe_counts(class_counts: Tensor) -> str:
    return f"{int(class_counts.sum()):,} images of {len(class_counts)} classes"
