"""The processes of a run: torchrun starts them, and this module connects them. One process needs neither.

Every function named after a collective of torch.distributed is one: all processes must call it, in the same order.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rcl_fast.train.errors import EndedByMain, UserError

T = TypeVar("T")

# Variables that torchrun sets for each process; this module and torch's rendezvous read them.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def init_process_group(device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Makes one group of the processes that torchrun started: NCCL for a GPU's tensors, gloo for the CPU's.

    A process that waits for another for longer than the time-out fails. Raises UserError without torchrun's variables.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL, events and graphs belong to the current device
    started = processes_started()
    if started == 1:
        yield
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {started}, for training on several processes, but {', '.join(missing)} is not set: start "
            f"them with torchrun --nproc-per-node {started} train/run.py ..., or unset WORLD_SIZE for one"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(_name_of_this_start(store, rank, world, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error: it may wait for processes that are gone


def _name_of_this_start(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """Returns a name that the processes of this start share, and those of no other start, before there is a group.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone. Its count of restarts is
    no such name: it is each node's own, and differs where one node's failure was noticed by another one's torchrun.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"process {rank}", mine)
        name = store.get(mine).decode()
        store.set(f"{name} process {rank}", "is here")
        return name
    others, deadline = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while others:
        for other in list(others):
            if store.check([f"{mine} process {other}"]):
                others.remove(other)
            elif store.check([f"process {other}"]):  # what it says may be from an earlier start: then ask again
                store.set(store.get(f"process {other}").decode(), mine)
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} for processes {sorted(others)} of {world} to start")
        time.sleep(0.02)
    return mine


def processes_started() -> int:
    """Returns how many processes torchrun started, even before there is a group; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_size() -> int:
    """Returns how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Returns whether this is the one process that prints and writes."""
    return rank() == 0


def group() -> Any:
    """Returns the group of all processes, as `contrastive_loss` takes it; None for one process."""
    return dist.group.WORLD if world_size() > 1 else None


def local_rank() -> int | None:
    """Returns this process's number on its machine, even before there is a group; None in a run of one process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if processes_started() > 1 else None


def all_reduce_counts(*counts: int) -> list[int]:
    """Returns each count summed over all processes; for a flag, that is the number of processes where it is true."""
    if world_size() == 1:
        return [int(count) for count in counts]
    sums = torch.tensor([int(count) for count in counts])
    dist.all_reduce(sums)
    return sums.tolist()


def all_reduce(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(local_mean: Tensor, weight: Tensor) -> Tensor:
    """Returns the mean over all processes of a scalar that is, in each, a mean over images with the weight `weight`.

    All processes get the same value. As with contrastive_loss(group=...), the gradient is W times the true one;
    DistributedDataParallel then divides it by W.
    """
    return local_mean if world_size() == 1 else _AllReduceMean.apply(local_mean, weight)


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local_mean: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(local_mean)
        total = torch.stack([local_mean * weight, weight])
        dist.all_reduce(total)
        context.save_for_backward(weight * world_size() / total[1])
        return total[0] / total[1]

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (share,) = context.saved_tensors
        return grad_outputs[0] * share, None


def broadcast_object(value: T) -> T:
    """Returns the main process's value, in every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Copies the main process's buffers to all: each process has BatchNorm statistics of its own images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def all_gather_object(value: T) -> list[T]:
    """Returns all processes' values by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_object(value: T) -> list[T]:
    """Returns all processes' values by rank on the main one, and elsewhere this process's alone."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return [value] if values is None else values


def run_on_main(function: Callable[[], T]) -> T:
    """Calls `function` on the main process alone and returns its value in every process.

    Raises:
        UserError: on the main process, where the function raised it.
        EndedByMain: then on the others.
    """
    value, refused = None, None
    if is_main():
        try:
            value = function()
        except UserError as error:
            refused = error
    value, ended = broadcast_object((value, refused is not None))
    if refused is not None:
        raise refused
    if ended:
        raise EndedByMain
    return value  # type: ignore[return-value]  # the function's value
