"""What the backends need of autograd: products that autocast never rounds, and gradients that raise where they are
differentiated again instead of giving a wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right, [R, D] and [D, S] -> [R, S], in their dtype also where backward runs inside autocast.

    Differentiable any number of times, and by `torch.func`.
    """
    with torch.autocast(left.device.type, enabled=False):
        # torch.compile takes no Function with forward-mode derivatives.
        return (_Product if torch.compiler.is_compiling() else _ProductWithForwardMode).apply(left, right)


class _Product(torch.autograd.Function):
    """A matrix product whose derivatives are made of itself: PyTorch's own would be rounded to 16 bits in autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return product(grad_output, right.mT), product(left.mT, grad_output)


class _ProductWithForwardMode(_Product):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, of_left: Tensor, of_right: Tensor) -> Tensor:
        left, right = ctx.saved_tensors
        return product(of_left, right) + product(left, of_right)


def first_derivative_only(who: str) -> Callable[[Backward], Backward]:
    """Decorates a backward(ctx, *grad_outputs) that computes numbers, not a graph; it runs outside autocast.

    Its gradients may be made with create_graph=True. Differentiating them raises a RuntimeError with `who` in it. The
    Function must save an output or inputs, so that the gradients are seen to depend on what they depend on.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad(), torch.autocast(_device_type(grad_outputs), enabled=False):
                gradients = backward(ctx, *grad_outputs)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients  # compiled code has first derivatives only, and says so itself
            depends_on = [one for one in (*ctx.saved_tensors, *grad_outputs) if one is not None and one.requires_grad]
            return tuple(None if one is None else _Once.apply(who, one, *depends_on) for one in gradients)

        return wrapped

    return decorate


def _device_type(tensors: tuple[Tensor | None, ...]) -> str:
    types = [tensor.device.type for tensor in tensors if tensor is not None]
    return types[0] if types else "cpu"  # PyTorch 2.7 does not compile next() with a default


class _Once(torch.autograd.Function):
    """Passes a gradient on, as a function of what it depends on; refuses to be differentiated."""

    @staticmethod
    def forward(who: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.who = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.who} has first derivatives only, and its gradient was differentiated again (a gradient penalty, a "
            "Hessian-vector product); use backend='dense' in one process, without group=, which has all derivatives "
            "and keeps the N×M matrix"
        )
