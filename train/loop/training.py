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
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.network import ddp
from rcl_fast.train.network.models import LongTailedClassifier, build_network
from rcl_fast.train.network.objective import Objective
from rcl_fast.train.network.optimization import build_optimizer, build_schedule, restore
from rcl_fast.train.options import Config
from rcl_fast.train.runtime import distributed, rng_state
from rcl_fast.train.runtime.hardware import Runtime


@dataclass
class Training:
    """Everything that training changes, and that a checkpoint holds."""

    config: Config
    runtime: Runtime
    model: LongTailedClassifier
    ddp_model: nn.Module  # the model as training calls it: DistributedDataParallel around it in several processes
    objective: Objective
    optimizer: SGD
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    class_counts: Tensor  # int64 [C], training images of each class
    group_counts: Tensor  # int64 [C], the same with those held out: they define many, medium and few
    epoch: int = 0  # epochs done
    progress: Progress | None = None  # of the epoch under way; None between two epochs
    best_epoch: int = 0  # from 1; 0: none yet
    best_accuracy: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_accuracy: Tensor | None = None  # [C] of the last validation

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds. It is a collective, as it gathers the random state of each process."""
        objective = self.objective.state_dict()
        return {
            "of": origin(self.config, len(self.class_counts)),
            "class_counts": self.class_counts,
            "model": self.model.state_dict(),
            "compression": objective.pop("contrastive.compression", None),  # its place in earlier versions' files too
            "objective": objective,
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
            "random_states": distributed.all_gather_object(rng_state.state(self.runtime.device)),
        }

    def end_epoch(self, row: dict[str, Any]) -> bool:
        """Adds an epoch's figures to the history; returns whether it is the best so far."""
        self.epoch += 1
        self.progress = None
        self.history.append(row)
        is_best = row["balanced_accuracy"] > self.best_accuracy
        if is_best:
            self.best_epoch, self.best_accuracy = self.epoch, row["balanced_accuracy"]
        return is_best

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a checkpoint that `resuming` has checked, with as many processes as wrote it."""
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        if self.objective.contrastive is not None:
            self.objective.contrastive.set_compression(state["compression"])
        restore(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty where the run was not in fp16, perhaps on another machine
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_epoch, self.best_accuracy = state["epoch"], state["best_epoch"], state["best_accuracy"]
        self.progress = None if state["progress"] is None else Progress(**state["progress"])
        self.history, self.notes, self.class_accuracy = state["history"], state["notes"], state["class_accuracy"]
        rng_state.restore(state["random_states"][distributed.rank()], self.runtime.device)


def start_training(config: Config, splits: Splits, runtime: Runtime) -> Training:
    """Returns the state of a new run; everything that depends on the seed is initialised here."""
    torch.manual_seed(config.run.seed)
    class_counts = torch.as_tensor(splits.class_counts)
    model = build_network(config, splits.num_classes)
    model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stubs lag
    ddp_model = ddp.wrap(model, config, runtime)
    if distributed.rank() > 0:
        torch.manual_seed(_seed_of_process(config.run.seed, distributed.rank()))  # dropout differs between images
    optimizer = build_optimizer(config.optimization, model)
    return Training(
        config=config,
        runtime=runtime,
        model=model,
        ddp_model=ddp_model,
        objective=Objective(config, class_counts).to(runtime.device),
        optimizer=optimizer,
        schedule=build_schedule(config.optimization, optimizer),
        scaler=runtime.grad_scaler(),
        class_counts=class_counts,
        group_counts=torch.as_tensor(splits.published_counts),
    )


def _seed_of_process(seed: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def origin(config: Config, num_classes: int) -> dict[str, Any]:
    """Returns the record of its origin that a checkpoint holds, by the names of the options."""
    return {
        "dataset": config.data.dataset,
        "arch": config.model.arch,
        "classifier": config.model.classifier,
        "loss": config.loss.loss,
        "number of classes": num_classes,
    }
