"""Reading the losses of an epoch's steps: each is copied to the host at once, and read when the copy is ready."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.train.errors import NonFiniteLoss
from rcl_fast.train.loaders.base import Batch
from rcl_fast.train.loop.progress import Progress
from rcl_fast.train.runtime import distributed

MOST_PENDING = 2  # steps that the host may be ahead of the device; the views of these stay in memory
ADVICE = "A lower --lr, more --warmup-epochs or --precision fp32 often help."


class _Step(NamedTuple):
    names: list[str]
    values: Tensor  # on the CPU, valid once `ready` has happened
    ready: torch.cuda.Event | None  # None: they are valid now
    batch: Batch
    images: int  # of all processes


class LossReadback:
    """What counts losses in `progress`, in the order of their steps.

    To read a loss right after its step would make a GPU wait for the host. Both methods raise NonFiniteLoss.
    """

    def __init__(self, progress: Progress, epoch: int) -> None:
        self._progress = progress
        self._epoch = epoch
        self._pending: deque[_Step] = deque()

    def add(self, losses: dict[str, Tensor], batch: Batch, images: int) -> None:
        """Adds a step's losses, scalars on the device, with its batch; counts the losses that are ready."""
        on_gpu = any(loss.is_cuda for loss in losses.values())
        values = torch.stack([loss.double() for loss in losses.values()]).to("cpu", non_blocking=on_gpu)
        ready = None
        if on_gpu:
            ready = torch.cuda.Event(blocking=True)  # the host sleeps: other runs may need its cores
            ready.record()
        self._pending.append(_Step(list(losses), values, ready, batch, images))
        while self._pending and (_is_ready(self._pending[0]) or len(self._pending) > MOST_PENDING):
            self._count(self._pending.popleft())

    def read_all(self) -> None:
        """Waits for all losses that are pending, and counts them."""
        while self._pending:
            self._count(self._pending.popleft())

    def _count(self, step: _Step) -> None:
        if step.ready is not None:
            step.ready.synchronize()
        values = dict(zip(step.names, step.values.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise NonFiniteLoss(_describe_batch(values, step.batch, self._epoch))
        self._progress.count(values, step.images)


def _is_ready(step: _Step) -> bool:
    # Several processes have to read a loss at the same step, so that all end there where it is not finite.
    return step.ready is None or (distributed.world_size() == 1 and step.ready.query())


def _describe_batch(values: dict[str, float], batch: Batch, epoch: int) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
    images = {f"x{number}": f"{view.min():.3g} to {view.max():.3g}" for number, view in enumerate(batch.views, start=1)}
    ranges = f"pixel ranges {images}; " if images else ""  # a CUDA-graph step keeps no views
    labels, counts = batch.labels.unique(return_counts=True)
    return (
        f"the loss is not finite in epoch {epoch + 1}: {parts}. The batch: {len(batch.labels)} images of "
        f"{len(labels)} classes (most: class {labels[counts.argmax()].item()}, {counts.max().item()} times); {ranges}"
        f"positions in the training set {batch.indices.tolist()}. {ADVICE}"
    )
