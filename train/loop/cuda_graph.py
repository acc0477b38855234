"""A training step as one CUDA graph: the random parameters, the views, the network, its loss and the update.

A small network's step is hundreds of short operations; a GPU ends each sooner than the host can start the next. In a
CUDA graph they are captured once and then start together. The graph always reads and writes the same memory. So what
differs from step to step (which images, of which epoch, the learning rate) is copied there before each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD

from rcl_fast.train.errors import refuse
from rcl_fast.train.loaders.base import Batch, Loader
from rcl_fast.train.loaders.device import DeviceLoader, IndexBatch
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training
from rcl_fast.train.network import ddp
from rcl_fast.train.options import Config
from rcl_fast.train.runtime import distributed, rng_state
from rcl_fast.train.runtime.hardware import Runtime

Losses = dict[str, Tensor]
WARM_UP_STEPS = 3  # for cuDNN's search, Triton's and torch.compile's compilation, and buffers that are made once


class Inputs(NamedTuple):
    """The inputs that differ from step to step, on the device."""

    indices: Tensor  # int64 [b], of the images
    epoch: Tensor  # int64 []
    learning_rate: Tensor  # float32 []


class GraphedStep:
    """A `Step` for the batches of `loader`, all of one size, that replays one CUDA graph."""

    def __init__(self, device_loader: DeviceLoader) -> None:
        self.loader: Loader = _IndexLoader(device_loader)
        self._device_loader = device_loader
        self._inputs: Inputs | None = None
        self._replay: Callable[[], Losses] | None = None
        self._compression: Tensor | None = None

    def __call__(self, training: Training, batch: Batch) -> Losses:
        assert isinstance(batch, IndexBatch)  # self.loader gives these
        if self._inputs is None:
            learning_rate = torch.zeros((), device=training.runtime.device)
            self._inputs = Inputs(batch.indices_on_device.clone(), batch.epoch.clone(), learning_rate)
        self._inputs.indices.copy_(batch.indices_on_device)
        self._inputs.epoch.copy_(batch.epoch)
        self._inputs.learning_rate.fill_(training.optimizer.param_groups[0]["lr"])
        compression = _compression(training)
        if self._replay is None or self._compression is not compression:  # Python's only branch in a step
            self._replay, self._compression = self._captured(training, self._inputs), compression
        return self._replay()

    def _captured(self, training: Training, inputs: Inputs) -> Callable[[], Losses]:
        self._replay = None  # frees the memory of the graph before for this one
        with _rate(training.optimizer, inputs.learning_rate):
            return capture(lambda: self._step(training, inputs), training)

    def _step(self, training: Training, inputs: Inputs) -> Losses:
        views = self._device_loader.views(inputs.indices, inputs.epoch)
        return train_step(training, Batch(views, self._device_loader.labels(inputs.indices), inputs.indices))


class _IndexLoader:
    """A Loader of a DeviceLoader's batches without views, which the graph makes."""

    def __init__(self, loader: DeviceLoader) -> None:
        self.steps_per_epoch = loader.steps_per_epoch
        self.fingerprint = loader.fingerprint
        self.epoch: Callable[..., Iterator[Batch]] = loader.index_batches


def check(config: Config, runtime: Runtime) -> None:
    """Raises UserError where a step can't be captured, with what to change; the loader may still be "auto"."""
    problems = {
        f"needs a GPU, and the device is {runtime.device.type}": runtime.device.type != "cuda",
        f"needs --loader device, and this is {config.data.loader}": config.data.loader not in ("device", "auto"),
        "makes the views within the step: leave out --synthetic-data": config.data.synthetic_data,
        "runs the batch in one part: leave out --accumulate": config.optimization.accumulate > 1,
        "leaves no room for fp16's loss scaling: take --precision fp32 or bf16": runtime.precision == "fp16",
        "is one process's: start it without torchrun; train/reproduce.py shares out runs": (
            distributed.world_size() > 1
        ),
    }
    refuse({f"--cuda-graph {problem}": holds for problem, holds in problems.items()})


def capture(step: Callable[[], Losses], training: Training) -> Callable[[], Losses]:
    """Captures a step; returns the function that replays it. `training` stays as it was.

    The function returns the losses in the same tensors each time. It follows
    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """
    device = training.runtime.device
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
    """Restores after steps inside everything that they change, but for gradients."""
    tensors = [
        *training.model.parameters(),
        *training.model.buffers(),
        *(state["momentum_buffer"] for state in training.optimizer.state.values()),
    ]
    with rng_state.preserved(training.runtime.device), ddp.preserved(tensors):
        yield


@contextmanager
def _rate(optimizer: SGD, learning_rate: Tensor) -> Iterator[None]:
    """Has the optimiser read its rate from a tensor inside; afterwards it is the schedule's number again."""
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
