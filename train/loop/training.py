"""The state of a run: everything that training changes, and that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.loaders import base
from rcl_fast.train.loaders.base import Loader
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.network import parallel
from rcl_fast.train.network.models import LongTailedClassifier
from rcl_fast.train.network.objective import Objective
from rcl_fast.train.network.optimization import build_optimizer, build_schedule, restore
from rcl_fast.train.options import Config, has_prototypes
from rcl_fast.train.runtime import distributed, rng_state
from rcl_fast.train.runtime.machine import Machine


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
            "random_states": distributed.gathered(rng_state.state(self.machine.device)),
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
        rng_state.restore(state["random_states"][distributed.rank()], self.machine.device)

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


def start_training(config: Config, splits: Splits, machine: Machine) -> Training:
    """A fresh run: everything that depends on the seed is drawn here."""
    torch.manual_seed(config.run.seed)
    class_counts = torch.as_tensor(splits.class_counts)
    model = LongTailedClassifier(
        config.model, splits.num_classes, embeds=config.contrastive, has_prototypes=has_prototypes(config)
    )
    model.to(machine.device, memory_format=machine.memory_format)  # type: ignore[call-overload]  # torch's stubs lag
    network = parallel.network(model, config, machine)
    if distributed.rank() > 0:
        torch.manual_seed(_seed_of_process(config.run.seed, distributed.rank()))  # dropout differs between images
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


def resume_training(training: Training, training_loader: Loader, state: dict[str, Any]) -> None:
    """Go on from a checkpoint's state.

    Raises:
        SystemExit: the checkpoint is of another network or data set.
        StateMismatch: the loader gives other batches than those that the checkpoint goes on with.
    """
    training.check(state)
    base.position(training_loader, state["loader"])
    training.load_state_dict(state)


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


def _describe_counts(class_counts: Tensor) -> str:
    return f"{int(class_counts.sum()):,} images of {len(class_counts)} classes"
