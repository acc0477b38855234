"""The optimiser and its schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from rcl_fast.train.options import OptimizationOptions


def build_optimizer(options: OptimizationOptions, model: nn.Module) -> SGD:
    """Returns SGD over every parameter, with weight decay on each, as in the recipes."""
    parameters = list(model.parameters())
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)  # one kernel for all of them
    optimizer = SGD(
        parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=fused
    )
    _lay_out_momentum(optimizer)
    return optimizer


def restore(optimizer: SGD, state: dict[str, Any]) -> None:
    """Loads a checkpoint's state, but for how updates are computed: that depends on this machine."""
    fused = optimizer.defaults["fused"]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = fused
    _lay_out_momentum(optimizer)


def _lay_out_momentum(optimizer: SGD) -> None:
    """Gives each parameter a momentum buffer in its own memory layout; the fused kernel goes by the order of memory.

    A new buffer is zero, with which the first step is the same as without a buffer. The fused kernel would make the
    buffers in the first step, and leave them uninitialised where fp16's scaling skips that step. A CUDA graph has no
    first step of its own.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            momentum = torch.zeros_like(parameter)
            if state.get("momentum_buffer") is not None:
                momentum.copy_(state["momentum_buffer"])
            state["momentum_buffer"] = momentum


def build_schedule(options: OptimizationOptions, optimizer: SGD) -> LRScheduler:
    """Returns the schedule by epochs: linear warm-up, then steps or a cosine. Step it once after each epoch."""
    warmup = min(options.warmup_epochs, options.epochs - 1)
    if options.schedule == "steps":
        milestones = [round(share * options.epochs) - warmup for share in options.milestones]
        main: LRScheduler = MultiStepLR(optimizer, milestones, gamma=options.lr_decay)
    else:
        main = CosineAnnealingLR(optimizer, T_max=options.epochs - warmup)
    if warmup == 0:
        return main
    # The first epoch runs at 1/warmup of the rate, the last of the warm-up and the one after it at the full rate.
    ramp = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(1, warmup - 1))
    return SequentialLR(optimizer, [ramp, main], milestones=[warmup])
