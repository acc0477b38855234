"""The losses of an epoch's steps: a device is asked for each at once, and the host reads it when it has come."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.train.loaders.base import Batch
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.runtime import distributed

MOST_UNDER_WAY = 2  # steps that the host may be ahead of the device; their views stay in memory until then
ADVICE = "A lower --lr, more --warmup-epochs or --precision fp32 often help."


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message describes the batch."""


class _Step(NamedTuple):
    names: list[str]
    values: Tensor  # on the CPU, once `come` has happened
    come: torch.cuda.Event | None  # None: they are there
    batch: Batch
    images: int  # of all processes


class StepLosses:
    """Counts losses in `progress` in their order, as they come: reading one at once would make a GPU wait for the host.

    Methods that read raise NonFiniteLoss.
    """

    def __init__(self, progress: Progress, epoch: int) -> None:
        self._progress = progress
        self._epoch = epoch
        self._under_way: deque[_Step] = deque()

    def add(self, losses: dict[str, Tensor], batch: Batch, images: int) -> None:
        """A step's, scalars on the device, and what they are of; reads those that have come."""
        on_gpu = any(loss.is_cuda for loss in losses.values())
        values = torch.stack([loss.double() for loss in losses.values()]).to("cpu", non_blocking=on_gpu)
        come = None
        if on_gpu:
            come = torch.cuda.Event(blocking=True)  # the host sleeps: other runs may need its cores
            come.record()
        self._under_way.append(_Step(list(losses), values, come, batch, images))
        while self._under_way and (_has_come(self._under_way[0]) or len(self._under_way) > MOST_UNDER_WAY):
            self._count(self._under_way.popleft())

    def read_all(self) -> None:
        while self._under_way:
            self._count(self._under_way.popleft())

    def _count(self, step: _Step) -> None:
        if step.come is not None:
            step.come.synchronize()
        values = dict(zip(step.names, step.values.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise NonFiniteLoss(_describe_batch(values, step.batch, self._epoch))
        self._progress.count(values, step.images)


def _has_come(step: _Step) -> bool:
    # Several processes have to read at the same step: they end together where a loss is not finite.
    return step.come is None or (distributed.world() == 1 and step.come.query())


def _describe_batch(values: dict[str, float], batch: Batch, epoch: int) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
    images = {
        name: f"{view.min():.3g} to {view.max():.3g}" for name, view in batch.items() if name in ("x1", "x2", "x3")
    }
    ranges = f"pixel ranges {images}; " if images else ""  # a whole step keeps no views
    labels, counts = batch["label"].unique(return_counts=True)
    return (
        f"the loss is not finite in epoch {epoch + 1}: {parts}. The batch: {len(batch['label'])} images of "
        f"{len(labels)} classes (most: class {labels[counts.argmax()].item()}, {counts.max().item()} times); {ranges}"
        f"positions in the training set {batch['index'].tolist()}. {ADVICE}"
    )
