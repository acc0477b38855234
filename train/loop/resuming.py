"""Going on from a checkpoint: first whether it is of this run and fits it, part by part, and only then is it loaded.

A checkpoint of something else is refused. One of this run that does not fit is a damaged one: `Unfit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rcl_fast.train.errors import UserError
from rcl_fast.train.loaders.base import Loader, read_loader_state
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.loop.training import Training, origin
from rcl_fast.train.network import optimization
from rcl_fast.train.options import Config
from rcl_fast.train.runtime import distributed, rng_state


class Unfit(UserError):
    """What a checkpoint holds does not fit the network, the optimiser or another part of its run."""


def resume_training(training: Training, training_loader: Loader, state: dict[str, Any]) -> None:
    """Loads a checkpoint into `training`, after checks.

    Raises:
        UserError: the checkpoint is of another network or data set.
        StateMismatch: the loader gives other batches than the checkpoint's.
        Unfit: it is of this run, and yet does not fit it.
    """
    if "of" not in state:
        raise UserError("the checkpoint is of an earlier version of the trainer, which did not train like this one")
    check_origin(state["of"], training.config, len(training.class_counts))
    check_class_counts(state["class_counts"], training.class_counts)
    read_loader_state(training_loader, state["loader"])
    check_weights(state["model"], training.model)
    misfits = list(_misfits(training, state))
    if misfits:
        raise Unfit(f"the checkpoint does not fit its run: {'; '.join(misfits)}")
    training.load_state_dict(state)


def check_origin(of: dict[str, Any], config: Config, num_classes: int) -> None:
    """Raises UserError where a checkpoint's record of its origin is not of this run."""
    differing = [
        f"{name} {of.get(name)!r}, not {value!r}"
        for name, value in origin(config, num_classes).items()
        if of.get(name) != value
    ]
    if differing:
        raise UserError(
            f"the checkpoint is of another run: {'; '.join(differing)}. Its folder's config.json was changed, or "
            "the checkpoint was copied there from elsewhere; nothing was written"
        )


def check_class_counts(saved: Tensor, class_counts: Tensor) -> None:
    """Raises UserError where a checkpoint's class counts [C] are not those of the data set as it is now."""
    if not torch.equal(saved, class_counts):
        raise UserError(
            f"the checkpoint's training set ({_describe_counts(saved)}) is not this run's "
            f"({_describe_counts(class_counts)}): the data set has changed on disk"
        )


def check_weights(weights: dict[str, Any], model: nn.Module) -> None:
    """Raises Unfit where a checkpoint's weights are not those of this network, or not finite."""
    here, there = _described(model.state_dict()), _described(weights)
    if here != there:
        name = sorted(name for name in here | there if here.get(name) != there.get(name))[0]
        raise Unfit(
            f"the checkpoint does not fit this network: {name} is {there.get(name, 'missing')} there, "
            f"{here.get(name, 'missing')} here; another version of torchvision or timm may build another network of "
            "this name"
        )
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise Unfit(f"the checkpoint's weights are not finite: {name}")


def _misfits(training: Training, state: dict[str, Any]) -> Iterator[str]:
    """Gives what is wrong with the parts of a checkpoint beside its weights."""
    begun = state["epoch"] > 0 or state["progress"] is not None
    wrong = optimization.misfit(training.optimizer, state["optimizer"])
    if wrong is not None and (begun or state["optimizer"]["state"]):  # earlier versions had no momentum before a step
        yield f"the optimiser's state {wrong}"
    schedule = state["schedule"]
    if optimization.kind(training.schedule.state_dict()) != optimization.kind(schedule):
        yield "the schedule is another one"
    if schedule.get("last_epoch") != state["epoch"]:
        yield f"it is after epoch {state['epoch']}, and its schedule after {schedule.get('last_epoch')}"
    yield from _misfits_of_loss(training, state)
    yield from _misfits_of_position(training, state)
    if state["scaler"] and not state["scaler"].keys() >= {"scale", "growth_factor", "backoff_factor"}:
        yield "the state of fp16's scaling is another one"
    if len(state["random_states"]) != distributed.world_size():
        yield f"it has the random state of {len(state['random_states'])} processes"
    elif not all(rng_state.is_one(saved) for saved in state["random_states"]):
        yield "a random state is none"


def _misfits_of_loss(training: Training, state: dict[str, Any]) -> Iterator[str]:
    objective = deepcopy(training.objective)
    try:
        objective.load_state_dict(state["objective"])
        if objective.contrastive is not None:
            objective.contrastive.set_compression(state["compression"])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # of shapes, names, numbers
        yield f"the loss's state: {' '.join(str(error).split())}"
    accuracy = state["class_accuracy"]
    if accuracy is not None and accuracy.shape != training.class_counts.shape:
        yield f"it has the accuracy of {len(accuracy) if accuracy.dim() else 0} classes"


_ROW = {"epoch", "loss", "balanced_accuracy", "images_per_second", "waiting_for_data"}  # what the report needs of each


def _misfits_of_position(training: Training, state: dict[str, Any]) -> Iterator[str]:
    """Gives what is wrong with the record of how far the run is."""
    epoch, progress, history = state["epoch"], state["progress"], state["history"]
    if progress is not None and not _is_progress(progress):
        yield "the progress of its epoch is none"
        return
    steps = 0 if progress is None else progress["steps"]
    if (state["loader"]["epoch"], state["loader"]["step"]) != (epoch, steps):
        yield f"it is after epoch {epoch} and {steps} steps, and its loader elsewhere"
    if not 0 <= state["best_epoch"] <= epoch <= training.config.optimization.epochs:
        yield f"it is after epoch {epoch}, the best one {state['best_epoch']}"
    rows = [row for row in history if isinstance(row, dict) and row.keys() >= _ROW]
    if [row["epoch"] for row in rows] != list(range(1, epoch + 1)) or len(rows) < len(history):
        yield f"its history is not that of {epoch} epochs"
    if not all(isinstance(note, str) for note in state["notes"]):
        yield "its notes are no sentences"


def _is_progress(saved: dict[str, Any]) -> bool:
    names = {field.name for field in dataclasses.fields(Progress)}
    numbers = {name: value for name, value in saved.items() if name != "totals"}
    return (
        saved.keys() <= names
        and isinstance(saved.get("totals"), dict)
        and isinstance(saved.get("steps"), int)
        and all(isinstance(value, int | float) for value in numbers.values())
    )


def _described(tensors: dict[str, Any]) -> dict[str, str]:
    """Returns each tensor's dtype and shape in words."""
    described = {}
    for name, tensor in tensors.items():
        is_one = isinstance(tensor, Tensor)
        described[name] = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") if is_one else "no tensor"
    return described


def _describe_counts(class_counts: Tensor) -> str:
    return f"{int(class_counts.sum()):,} images of {len(class_counts)} classes"
