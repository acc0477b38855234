"""The network as a process trains it: compiled, and where there are others, averaging its gradients with theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from rcl_fast.train.network.models import LongTailedClassifier, Outputs
from rcl_fast.train.options import Config, training_kinds
from rcl_fast.train.runtime import distributed, rng_state
from rcl_fast.train.runtime.machine import Machine

_HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}


def network(model: LongTailedClassifier, config: Config, machine: Machine) -> nn.Module:
    """What training calls in place of `model`, which is on the machine's device; they share their parameters.

    Raises SystemExit for --sync-batchnorm on CPUs.
    """
    alone = distributed.world() == 1
    if config.model.sync_batchnorm and not alone:
        _synchronize_batchnorm(model, machine)
    never_used = not alone and _has_unused_parameters(model, config, machine)
    if config.run.compile:
        model.backbone.compile()  # inside DistributedDataParallel, Dynamo cuts its graph at the buckets
    return model if alone else _distributed(model, config, machine, never_used)


def _synchronize_batchnorm(model: LongTailedClassifier, machine: Machine) -> None:
    if machine.device.type != "cuda":
        raise SystemExit("--sync-batchnorm needs GPUs: PyTorch's SyncBatchNorm does not run on a CPU")
    model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    if model.projection_head is not None:
        model.projection_head = nn.SyncBatchNorm.convert_sync_batchnorm(model.projection_head)
    # The prototypes' head stays: it sees the same C rows in every process.


def _distributed(
    model: LongTailedClassifier, config: Config, machine: Machine, never_used: bool
) -> DistributedDataParallel:
    # A static graph finds parameters that no step uses once; else they must be looked for in each. Without such
    # parameters it would change nothing. Dynamo and no_sync() do not go with it.
    static = never_used and not config.run.compile and config.optimization.accumulate == 1
    wrapped = DistributedDataParallel(
        model,
        device_ids=[machine.device] if machine.device.type == "cuda" else None,
        broadcast_buffers=False,  # training never reads them, and evaluation takes the main process's
        gradient_as_bucket_view=True,
        static_graph=static,
        find_unused_parameters=never_used and not static,
    )
    if config.optimization.gradient_compression != "none":
        wrapped.register_comm_hook(None, _HOOKS[config.optimization.gradient_compression])
    # DistributedDataParallel rearranges its buckets after its first step, and with them the order of sums over three
    # or more processes. A resumed run would repeat that at another step: here it happens before any.
    _backward_once(wrapped, model, config, machine)
    return wrapped


def _has_unused_parameters(model: LongTailedClassifier, config: Config, machine: Machine) -> bool:
    """Whether there are parameters that a step gives no gradient, as some of timm's networks have."""
    with _unchanged(model, machine):
        _outputs_sum(model, config, machine).backward()
        return any(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad)


def _backward_once(wrapped: nn.Module, model: LongTailedClassifier, config: Config, machine: Machine) -> None:
    with _unchanged(model, machine):
        _outputs_sum(wrapped, config, machine).backward()


def _outputs_sum(called: nn.Module, config: Config, machine: Machine) -> torch.Tensor:
    side = config.views.image_size
    batch = config.optimization.batch_size // distributed.world() // config.optimization.accumulate
    views = [
        machine.images(torch.zeros(batch, 3, side, side)) for _ in training_kinds(config.views, config.contrastive)
    ]
    with machine.autocast():
        outputs: Outputs = called(views)
    return torch.stack([output.float().sum() for output in outputs if output is not None]).sum()


@contextmanager
def _unchanged(model: nn.Module, machine: Machine) -> Iterator[None]:
    """A forward and backward pass inside leaves no trace."""
    with rng_state.kept(machine.device), kept(model.buffers()):
        yield
    model.zero_grad(set_to_none=True)


@contextmanager
def kept(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Afterwards they are as they were, like the running statistics of BatchNorm in a model's buffers."""
    tensors = list(tensors)
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
