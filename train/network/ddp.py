"""The network as a process trains it: compiled, and with several processes in DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from rcl_fast.train.errors import UserError
from rcl_fast.train.network.models import LongTailedClassifier, Outputs
from rcl_fast.train.options import Config, training_kinds
from rcl_fast.train.runtime import distributed, rng_state
from rcl_fast.train.runtime.hardware import Runtime

_HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}


def check(config: Config, runtime: Runtime) -> None:
    """Raises UserError for --sync-batchnorm on a CPU; an earlier version let one process begin with it."""
    begins = config.run.resume is None or distributed.world_size() > 1
    if config.model.sync_batchnorm and runtime.device.type != "cuda" and begins:
        raise UserError("--sync-batchnorm needs GPUs: PyTorch's SyncBatchNorm does not run on a CPU")


def wrap(model: LongTailedClassifier, config: Config, runtime: Runtime) -> nn.Module:
    """Returns what training calls in place of `model`, which is on the runtime's device; both share their parameters.

    The configuration is one that `check` allows.
    """
    alone = distributed.world_size() == 1
    if config.model.sync_batchnorm and not alone:
        _synchronise_batchnorm(model)
    never_used = not alone and _has_unused_parameters(model, config, runtime)
    if config.run.compile:
        model.backbone.compile()  # inside DistributedDataParallel, Dynamo cuts its graph at the buckets
    return model if alone else _distributed(model, config, runtime, never_used)


def _synchronise_batchnorm(model: LongTailedClassifier) -> None:
    model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    if model.projection_head is not None:
        model.projection_head = nn.SyncBatchNorm.convert_sync_batchnorm(model.projection_head)
    # The prototypes' head stays: it sees the same C rows in every process.


def _distributed(
    model: LongTailedClassifier, config: Config, runtime: Runtime, never_used: bool
) -> DistributedDataParallel:
    # Parameters that no step uses are found once with a static graph, and else in each step. Without such parameters a
    # static graph would change nothing. It does not go with Dynamo or no_sync().
    static = never_used and not config.run.compile and config.optimization.accumulate == 1
    ddp_model = DistributedDataParallel(
        model,
        device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
        broadcast_buffers=False,  # training never reads them, and evaluation broadcasts the main process's
        gradient_as_bucket_view=True,
        static_graph=static,
        find_unused_parameters=never_used and not static,
    )
    if config.optimization.gradient_compression != "none":
        ddp_model.register_comm_hook(None, _HOOKS[config.optimization.gradient_compression])
    # DistributedDataParallel rearranges its buckets after its first backward pass, and with them the order of sums over
    # three or more processes. A resumed run would do that at another step, so it is done here, before any step.
    _backward_once(ddp_model, model, config, runtime)
    return ddp_model


def _has_unused_parameters(model: LongTailedClassifier, config: Config, runtime: Runtime) -> bool:
    """Returns whether a step leaves some parameters without a gradient, as it does in some of timm's networks."""
    with _unchanged(model, runtime):
        _outputs_sum(model, config, runtime).backward()
        return any(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad)


def _backward_once(ddp_model: nn.Module, model: LongTailedClassifier, config: Config, runtime: Runtime) -> None:
    with _unchanged(model, runtime):
        _outputs_sum(ddp_model, config, runtime).backward()


def _outputs_sum(called: nn.Module, config: Config, runtime: Runtime) -> torch.Tensor:
    side = config.views.image_size
    batch = config.optimization.batch_size // distributed.world_size() // config.optimization.accumulate
    views = [
        runtime.images(torch.zeros(batch, 3, side, side)) for _ in training_kinds(config.views, config.contrastive)
    ]
    with runtime.autocast():
        outputs: Outputs = called(views)
    return torch.stack([output.float().sum() for output in outputs if output is not None]).sum()


@contextmanager
def _unchanged(model: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Restores the model and the random state after a forward and backward pass inside."""
    with rng_state.preserved(runtime.device), preserved(model.buffers()):
        yield
    model.zero_grad(set_to_none=True)


@contextmanager
def preserved(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restores the tensors afterwards, such as the running statistics of BatchNorm in a model's buffers."""
    tensors = list(tensors)
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
