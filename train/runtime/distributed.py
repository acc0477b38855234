"""The processes of a run: torchrun starts them, here they meet. One process needs no torchrun and no group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# What torchrun sets for each process, and what init_process_group reads.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group: NCCL for a GPU's tensors, gloo for the CPU's.

    A process that waits for another for longer than the time-out fails. Raises SystemExit without torchrun's variables.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL, events and graphs are of the current one
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        yield
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise SystemExit(
            f"WORLD_SIZE is {started}, for training on several processes, but {', '.join(missing)} is not set: start "
            f"them with torchrun --nproc-per-node {started} train/run.py ..., or unset WORLD_SIZE for one"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a restart, and with it the addresses of the processes that are gone.
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error: it may wait for processes that are gone


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one process that prints and writes."""
    return rank() == 0


def group() -> Any:
    """The group of all processes, as `contrastive_loss` takes it; None for one process."""
    return dist.group.WORLD if world() > 1 else None


def local_rank() -> int | None:
    """This process's number on its machine, before they have met too; None where it is the only one of the run."""
    return int(os.environ.get("LOCAL_RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def totals(*counts: int) -> list[int]:
    """Each count summed over all processes. Flags too: how many processes raise them."""
    if world() == 1:
        return [int(count) for count in counts]
    summed = torch.tensor([int(count) for count in counts])
    dist.all_reduce(summed)
    return summed.tolist()


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_main(value: T) -> T:
    """The main process's value, on all."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gathered(value: T) -> list[T]:
    """All processes' values by rank, on all."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gathered_on_main(value: T) -> list[T]:
    """All processes' values by rank, on the main one; elsewhere this process's alone."""
    if world() == 1:
        return [value]
    values: list[Any] | None = [None] * world() if is_main() else None
    dist.gather_object(value, values)
    return [value] if values is None else values


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns, called on the main process alone. Where it ends the run (SystemExit), all end."""
    value, stop = None, None
    if is_main():
        try:
            value = function()
        except SystemExit as error:
            stop = error
    value, stopped = from_main((value, stop is not None))
    if stop is not None:
        raise stop
    if stopped:
        raise SystemExit(1)  # the main process says why
    return value  # type: ignore[return-value]  # that of function


def take_buffers_of_main(model: torch.nn.Module) -> None:
    """Each process's BatchNorm has statistics of its own images: those of the main one are taken everywhere."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def mean(of_mine: Tensor, weight: Tensor) -> Tensor:
    """The mean over all processes of a scalar that is a mean over this one's images, which together weigh `weight`.

    All processes get the same value. As with contrastive_loss(group=...), the gradient is W times the true one, so that
    DistributedDataParallel's division by W leaves exactly one process's.
    """
    return of_mine if world() == 1 else _Mean.apply(of_mine, weight)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, of_mine: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(of_mine)
        total = torch.stack([of_mine * weight, weight])
        dist.all_reduce(total)
        context.save_for_backward(weight * world() / total[1])
        return total[0] / total[1]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (share,) = context.saved_tensors
        return gradients[0] * share, None
