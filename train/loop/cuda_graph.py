"""A training step as one CUDA graph: the draws, the views, the network, its loss and the update.

A small network's step is hundreds of short operations, which a GPU ends sooner than a host can start the next. Captured
once, they all start together. A graph reads and writes where it did when it was captured: what differs from step to
step (which images, of which epoch, the learning rate) is written to its place before each start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD

from rcl_fast.train.loaders.base import Batch, Loader
from rcl_fast.train.loaders.device import DeviceLoader
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training
from rcl_fast.train.network import parallel
from rcl_fast.train.options import Config
from rcl_fast.train.runtime import distributed, rng_state
from rcl_fast.train.runtime.machine import Machine

Losses = dict[str, Tensor]
WARM_UP_STEPS = 3  # cuDNN's search, Triton's and torch.compile's compilation, and buffers that are made once


class Inputs(NamedTuple):
    """What a step reads that another step does not, on the device."""

    images: Tensor  # int64 [b], their numbers
    epoch: Tensor  # int64 []
    learning_rate: Tensor  # float32 []


class WholeStep:
    """A `Step` for the batches of `order`, all of one size."""

    def __init__(self, loader: DeviceLoader) -> None:
        self.order: Loader = _Order(loader)
        self._loader = loader
        self._inputs: Inputs | None = None
        self._replay: Callable[[], Losses] | None = None
        self._compression: Tensor | None = None

    def __call__(self, training: Training, batch: Batch) -> Losses:
        if self._inputs is None:
            self._inputs = Inputs(
                batch["index_there"].clone(), batch["epoch"].clone(), torch.zeros((), device=training.machine.device)
            )
        self._inputs.images.copy_(batch["index_there"])
        self._inputs.epoch.copy_(batch["epoch"])
        self._inputs.learning_rate.fill_(training.optimizer.param_groups[0]["lr"])
        compression = _compression(training)
        if self._replay is None or self._compression is not compression:  # the one thing that Python decides in a step
            self._replay, self._compression = self._captured(training, self._inputs), compression
        return self._replay()

    def _captured(self, training: Training, inputs: Inputs) -> Callable[[], Losses]:
        self._replay = None  # the memory of the graph before is free for this one
        with _rate(training.optimizer, inputs.learning_rate):
            return capture(lambda: self._step(training, inputs), training)

    def _step(self, training: Training, inputs: Inputs) -> Losses:
        views = self._loader.views(inputs.images, inputs.epoch)
        return train_step(training, {**views, "label": self._loader.labels(inputs.images)})


class _Order:
    """A Loader of the same batches, whose views are yet to be made."""

    def __init__(self, loader: DeviceLoader) -> None:
        self.steps_per_epoch = loader.steps_per_epoch
        self.identity = loader.identity
        self.epoch: Callable[..., Iterator[Batch]] = loader.order


def check(settings: Config, machine: Machine) -> None:
    """Raises SystemExit where a whole step can't be captured, with what to change."""
    problems = [
        message
        for wrong, message in [
            (machine.device.type != "cuda", f"needs a GPU, and the device is {machine.device.type}"),
            (settings.data.loader != "device", f"needs --loader device, and this is {settings.data.loader}"),
            (settings.data.synthetic_data, "makes the views within the step: leave out --synthetic-data"),
            (settings.optimization.accumulate > 1, "runs the batch in one part: leave out --accumulate"),
            (machine.precision == "fp16", "leaves no room for fp16's loss scaling: take --precision fp32 or bf16"),
            (
                distributed.world() > 1,
                "is one process's: start it without torchrun; train/reproduce.py shares out runs",
            ),
        ]
        if wrong
    ]
    if problems:
        raise SystemExit("\n".join(f"--cuda-graph {problem}" for problem in problems))


def capture(step: Callable[[], Losses], training: Training) -> Callable[[], Losses]:
    """Starts what `step` did on the GPU, whose losses are in the same tensors each time. `training` stays as it was.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """
    device = training.machine.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), unchanged(training):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    training.optimizer.zero_grad(set_to_none=True)  # the gradients' memory is then the graph's own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        losses = step()

    def replay() -> Losses:
        graph.replay()
        return losses

    return replay


@contextmanager
def unchanged(training: Training) -> Iterator[None]:
    """Steps inside leave no trace but gradients."""
    tensors = [
        *training.model.parameters(),
        *training.model.buffers(),
        *(state["momentum_buffer"] for state in training.optimizer.state.values()),
    ]
    with rng_state.kept(training.machine.device), parallel.kept(tensors):
        yield


@contextmanager
def _rate(optimizer: SGD, learning_rate: Tensor) -> Iterator[None]:
    """Inside, the optimiser reads its rate from a tensor; outside it is the schedule's number."""
    numbers = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    try:
        yield
    finally:
        for group, number in zip(optimizer.param_groups, numbers, strict=True):
            group["lr"] = number


def _compression(training: Training) -> Tensor | None:
    contrastive = training.objective.contrastive
    return None if contrastive is None else contrastive.compression
