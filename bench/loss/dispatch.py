"""Time that PyTorch takes around the kernels, forward and backward: through an autograd.Function, and an operator.

    python -m bench.loss.dispatch --output bench/results/speed/dispatch_cpu.jsonl

It runs on any machine: functions that return empty tensors take the place of the kernels. Each round runs both ways, so
that a slow moment of the machine meets both alike; figures are medians, in microseconds a forward and backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from bench.rows import append, spread
from rcl_fast.backends import triton as backend
from rcl_fast.kernels import passes
from rcl_fast.kernels.pack import KernelInputs, Sections

N, C, D = 16, 4, 16  # small: nothing but the way there is to take time
P = Sections(N, 0, C).starts[-1]  # packed rows
WAYS: dict[str, Callable[..., Any]] = {"function": backend._Loss.apply, "operator": backend._forward_op}


@dataclass
class Options:
    """What to measure."""

    rounds: int = 200
    """Rounds of both ways; the first one warms up and is not counted."""
    calls: int = 20
    """Forward and backward passes of one way in a round."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """Two rounds: proves the script."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if options.dry_run:
        options.rounds = 2
    with mock.patch.object(passes, "forward", forward), mock.patch.object(passes, "backward", backward):
        taken = measure(options.rounds, options.calls)
    rows = [{"way": way, "rounds": options.rounds, **spread("microseconds", figures)} for way, figures in taken.items()]
    for row in rows:
        print("{way:10} {microseconds:6.1f} µs ({microseconds_p20:.1f} to {microseconds_p80:.1f})".format(**row))
    print(f"the operator takes {rows[1]['microseconds'] - rows[0]['microseconds']:.0f} µs more")
    append(options.output, rows, options.dry_run)


def forward(inputs: KernelInputs) -> tuple[Tensor, ...]:
    """Returns tensors of the shapes that the kernels would fill."""
    return torch.empty(N), torch.empty(N), torch.empty(P, D), torch.empty(6, P), torch.empty(P).int()


def backward(*arguments: Any) -> tuple[Tensor, None, Tensor]:
    """Returns gradients of the right shapes, without computing them."""
    return torch.empty(N, D), None, torch.empty(C, D)


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Returns microseconds of a forward and backward pass of each way, round by round."""
    features, prototypes = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    labels = torch.arange(N) % C
    inputs = KernelInputs(*(features, None, prototypes, labels, None, None, None, 3.8, C), *(True, True, True, True))
    inputs_of = {"function": inputs, "operator": inputs._replace(root=torch.tensor(inputs.root))}
    grad_losses = torch.ones(N)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, losses_of in WAYS.items():
            began = time.perf_counter()
            for _ in range(calls):
                losses, *_ = losses_of(*inputs_of[way])
                torch.autograd.grad(losses, (features, prototypes), grad_losses)
            taken[way].append(1e6 * (time.perf_counter() - began) / calls)
    return {way: figures[1:] for way, figures in taken.items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
