"""Training: the state of a run, its epochs, and what is kept after each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from rcl_fast import LDAM, metrics
from rcl_fast.train import checkpoints, parallel, processes, randomness
from rcl_fast.train.accumulation import backward_in_parts
from rcl_fast.train.config import Config
from rcl_fast.train.data import loader
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.loader import Batch, Loader
from rcl_fast.train.evaluation import evaluate
from rcl_fast.train.logs import Log
from rcl_fast.train.machine import Machine
from rcl_fast.train.models import LongTailedClassifier, Outputs
from rcl_fast.train.objective import LossParts, Objective, compress, has_prototypes, reweights, starts_compression
from rcl_fast.train.optimization import build_optimizer, build_schedule, restore
from rcl_fast.train.progress import Progress
from rcl_fast.train.signals import Preempted, never
from rcl_fast.train.step_losses import ADVICE, NonFiniteLoss, StepLosses

Step = Callable[["Training", Batch], dict[str, Tensor]]
"""`train_step`, or what does the same in another way."""


@dataclass
class Training:
    """Everything that training changes, and that a checkpoint holds."""

    config: Config
    machine: Machine
    model: LongTailedClassifier
    network: nn.Module  # the model as training calls it; of several processes, with their gradients averaged
    objective: Objective
    optimizer: SGD
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    class_counts: Tensor  # int64 [C], what is trained on
    group_counts: Tensor  # int64 [C], with what is held out: they part many, medium and few
    epoch: int = 0  # epochs done
    progress: Progress | None = None  # of the epoch under way; None between two
    best_epoch: int = 0  # from 1; 0: none yet
    best_accuracy: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_accuracy: Tensor | None = None  # [C] of the last validation

    def state_dict(self) -> dict[str, Any]:
        """For all processes to call together: it holds the random state of each."""
        contrastive = self.objective.contrastive
        return {
            "of": self._describe(),
            "class_counts": self.class_counts,
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "compression": None if contrastive is None else contrastive.compression,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "progress": None if self.progress is None else self.progress.to_dict(),
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "history": self.history,
            "notes": self.notes,
            "class_accuracy": self.class_accuracy,
            "random_states": processes.gathered(randomness.state(self.machine.device)),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raises SystemExit where a checkpoint is of another network or data set."""
        if "of" not in state:
            raise SystemExit(
                "the checkpoint is of an earlier version of the trainer, which did not train like this one"
            )
        differing = [
            f"{name} {state['of'].get(name)!r}, not {value!r}"
            for name, value in self._describe().items()
            if state["of"].get(name) != value
        ]
        if differing:
            raise SystemExit(
                f"the checkpoint is of another run: {'; '.join(differing)}. Its folder's config.json was changed, or "
                "the checkpoint was copied there from elsewhere; nothing was written"
            )
        if not torch.equal(state["class_counts"], self.class_counts):
            raise SystemExit(
                f"the checkpoint's training set ({_describe_counts(state['class_counts'])}) is not this run's "
                f"({_describe_counts(self.class_counts)}): the data set has changed on disk"
            )
        own = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        saved = {name: tensor.shape for name, tensor in state["model"].items()}
        if own != saved:
            name = sorted(name for name in own | saved if own.get(name) != saved.get(name))[0]
            raise SystemExit(
                f"the checkpoint does not fit this network: {name} is {_shape(saved, name)} there, {_shape(own, name)} "
                "here; another version of torchvision or timm may build another network of this name"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint that `check` has passed, with as many processes as wrote it."""
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        if self.objective.contrastive is not None:
            self.objective.contrastive.set_compression(state["compression"])
        restore(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty where the run had no fp16, perhaps on another machine
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_epoch, self.best_accuracy = state["epoch"], state["best_epoch"], state["best_accuracy"]
        self.progress = None if state["progress"] is None else Progress(**state["progress"])
        self.history, self.notes, self.class_accuracy = state["history"], state["notes"], state["class_accuracy"]
        randomness.restore(state["random_states"][processes.rank()], self.machine.device)

    def _describe(self) -> dict[str, Any]:
        """What a checkpoint is of, by the names of the options."""
        config = self.config
        return {
            "dataset": config.data.dataset,
            "arch": config.model.arch,
            "classifier": config.model.classifier,
            "loss": config.loss.loss,
            "number of classes": len(self.class_counts),
        }


def start(config: Config, splits: Splits, machine: Machine) -> Training:
    """A fresh run: everything that depends on the seed is drawn here."""
    torch.manual_seed(config.run.seed)
    class_counts = torch.as_tensor(splits.class_counts)
    model = LongTailedClassifier(
        config.model, splits.num_classes, embeds=config.contrastive, has_prototypes=has_prototypes(config)
    )
    model.to(machine.device, memory_format=machine.memory_format)  # type: ignore[call-overload]  # torch's stubs lag
    network = parallel.network(model, config, machine)
    if processes.rank() > 0:
        torch.manual_seed(_seed_of_process(config.run.seed, processes.rank()))  # dropout differs between images
    optimizer = build_optimizer(config.optimization, model)
    return Training(
        config=config,
        machine=machine,
        model=model,
        network=network,
        objective=Objective(config, class_counts).to(machine.device),
        optimizer=optimizer,
        schedule=build_schedule(config.optimization, optimizer),
        scaler=machine.grad_scaler(),
        class_counts=class_counts,
        group_counts=torch.as_tensor(splits.published_counts),
    )


def _seed_of_process(seed: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def resume(training: Training, training_loader: Loader, state: dict[str, Any]) -> None:
    """Go on from a checkpoint's state.

    Raises:
        SystemExit: the checkpoint is of another network or data set.
        StateMismatch: the loader gives other batches than those that the checkpoint goes on with.
    """
    training.check(state)
    loader.position(training_loader, state["loader"])
    training.load_state_dict(state)


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
    processes.on_main(lambda: checkpoints.remove_mid_epoch(folder))


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
        due = processes.is_main() and time.monotonic() - self._saved >= 60 * minutes
        together, without, stop, due_somewhere = processes.totals(images, images == 0, self._stopping(), due)
        return _Agreed(together, ends=without > 0, saves=stop + due_somewhere > 0, stops=stop > 0)

    def _state(self) -> dict[str, Any]:
        progress = self._training.progress
        position = loader.state(self._loader, self._training.epoch, step=0 if progress is None else progress.steps)
        return {**self._training.state_dict(), "loader": position}

    def _write(self, name: str, state: dict[str, Any], previous: str | None = None) -> None:
        before = None if previous is None else self._folder / previous
        processes.on_main(lambda: checkpoints.save(self._folder / name, state, before))
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


def train_step(training: Training, batch: Batch) -> dict[str, Tensor]:
    """Forward, backward and one update; returns the detached losses by name, of all processes, on the device."""
    training.optimizer.zero_grad(set_to_none=True)
    views = [training.machine.images(batch[name]) for name in ("x1", "x2", "x3") if name in batch]
    labels = training.machine.labels(batch["label"])

    def loss_of(outputs: Outputs) -> tuple[LossParts, Tensor]:
        with training.machine.autocast():
            loss = training.objective(outputs, labels)
        return loss, training.scaler.scale(loss.total)

    parts = training.config.optimization.accumulate
    if parts > 1:
        loss = backward_in_parts(training.network, training.model, training.machine, views, parts, loss_of)
    else:
        with training.machine.autocast():
            outputs = training.network(views)
        loss, scaled = loss_of(outputs)
        scaled.backward()
    if training.config.optimization.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.config.optimization.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return {name: part.detach() for name, part in loss.parts().items()}


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


def _describe_counts(class_counts: Tensor) -> str:
    return f"{int(class_counts.sum()):,} images of {len(class_counts)} classes"
