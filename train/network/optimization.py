"""The optimiser and its schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from rcl_fast.train.options import OptimizationOptions


def build_optimizer(options: OptimizationOptions, model: nn.Module) -> SGD:
    """SGD over every parameter, decay included, as the recipes have it."""
    parameters = list(model.parameters())
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)  # one kernel for all of them
    optimizer = SGD(
        parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=fused
    )
    _lay_out_momentum(optimizer)
    return optimizer


def restore(optimizer: SGD, state: dict[str, Any]) -> None:
    """Go on from a checkpoint's state; how updates are computed is this machine's affair."""
    fused = optimizer.defaults["fused"]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = fused
    _lay_out_momentum(optimizer)


def _lay_out_momentum(optimizer: SGD) -> None:
    """In the parameters' memory layout, as the fused kernel goes by the order of memory; zero where there is none.

    From zero, the first step is what it would be without. That kernel makes the buffers in the first step, and leaves
    them uninitialised where fp16's scaling skips it; a CUDA graph has no first step at all.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            momentum = torch.zeros_like(parameter)
            if state.get("momentum_buffer") is not None:
                momentum.copy_(state["momentum_buffer"])
            state["momentum_buffer"] = momentum


def build_schedule(options: OptimizationOptions, optimizer: SGD) -> LRScheduler:
    """Per epoch: linear warm-up, then steps or a cosine; step it once after each epoch."""
    warmup = min(options.warmup_epochs, options.epochs - 1)
    if options.schedule == "steps":
        milestones = [round(share * options.epochs) - warmup for share in options.milestones]
        main: LRScheduler = MultiStepLR(optimizer, milestones, gamma=options.lr_decay)
    else:
        main = CosineAnnealingLR(optimizer, T_max=options.epochs - warmup)
    if warmup == 0:
        return main
    # The first epoch runs at 1/warmup of the rate, the epoch after the warm-up at all of it.
    ramp = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(1, warmup - 1))
    return SequentialLR(optimizer, [ramp, main], milestones=[warmup])
