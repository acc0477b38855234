"""The optimiser and its schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
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


def misfit(optimizer: SGD, state: dict[str, Any]) -> str | None:
    """Returns what is wrong with a saved state for this optimiser's parameters and settings; None where it fits."""
    here = optimizer.state_dict()
    groups = [{name: group[name] for name in _SETTINGS} for group in here["param_groups"]]
    saved = [
        {name: group.get(name) for name in _SETTINGS} for group in state["param_groups"] if isinstance(group, dict)
    ]
    if saved != groups:
        return "is of other parameters or settings"
    rates = [group.get("lr") for group in state["param_groups"]]
    if not all(isinstance(rate, int | float) and math.isfinite(rate) for rate in rates):
        return "has no learning rate"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        of_one = state["state"].get(number)
        momentum = of_one.get("momentum_buffer") if isinstance(of_one, dict) else None
        if not isinstance(momentum, Tensor) or momentum.shape != parameter.shape:
            there = list(momentum.shape) if isinstance(momentum, Tensor) else "missing"
            return f"has momentum {there} for parameter {number}, which is {list(parameter.shape)}"
        if not momentum.isfinite().all():
            return f"has momentum that is not finite, for parameter {number}"
    return None


_SETTINGS = ("params", "momentum", "weight_decay", "dampening", "nesterov", "maximize")  # what a run does not change


def kind(schedule: dict[str, Any]) -> Any:
    """Returns which schedule a saved state is of: what sets it apart from the others that `build_schedule` makes."""
    parts = schedule.get("_schedulers")
    return [kind(part) for part in parts] if isinstance(parts, list) else schedule.keys() & _NAMES


_NAMES = {"T_max", "milestones", "end_factor"}  # of a cosine, of steps, of the warm-up


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
