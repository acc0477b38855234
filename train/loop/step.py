"""One step: forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcl_fast.train.loaders.base import Batch
from rcl_fast.train.loop.accumulation import backward_in_parts
from rcl_fast.train.loop.training import Training
from rcl_fast.train.network.models import Outputs
from rcl_fast.train.network.objective import LossParts

Step = Callable[[Training, Batch], dict[str, Tensor]]
"""`train_step`, or a replacement that gives the same."""


def train_step(training: Training, batch: Batch) -> dict[str, Tensor]:
    """Runs forward, backward and one update; returns the losses of all processes by name, detached, on the device."""
    training.optimizer.zero_grad(set_to_none=True)
    views = [training.runtime.images(view) for view in batch.views]
    labels = training.runtime.labels(batch.labels)

    def loss_of(outputs: Outputs) -> tuple[LossParts, Tensor]:
        with training.runtime.autocast():
            loss = training.objective(outputs, labels)
        return loss, training.scaler.scale(loss.total)

    parts = training.config.optimization.accumulate
    if parts > 1:
        loss = backward_in_parts(training.ddp_model, training.model, training.runtime, views, parts, loss_of)
    else:
        with training.runtime.autocast():
            outputs = training.ddp_model(views)
        loss, scaled = loss_of(outputs)
        scaled.backward()
    if training.config.optimization.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.config.optimization.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return {name: part.detach() for name, part in loss.parts().items()}
