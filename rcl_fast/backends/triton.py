"""The loss through the Triton kernels, as one opaque operator forward and one backward.

There are two ways into autograd: what is traced, by torch.compile for one, takes the operators; all else a Function,
as forward and backward through the operators take 100 µs more of a CPU's time (bench/results/speed/dispatch_cpu.jsonl).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rcl_fast.autograd import first_derivative_only
from rcl_fast.backends.protocol import RowLosses
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.class_statistics import keys_per_class
from rcl_fast.kernels import block_sizes, passes
from rcl_fast.kernels.pack import KernelInputs, Packed
from rcl_fast.kernels.passes import BackwardOptions

_FIRST_ONLY = first_derivative_only("backend='triton'")


def losses(batch: ContrastiveBatch) -> Tensor:
    """Returns ℓ_i for each anchor, float32 [N]; 0 for an anchor without a positive. O((N + C)·D) memory.

    Differentiable once, in features and prototypes; the same bits every run. float32 products follow
    `torch.get_float32_matmul_precision()`: exact at "highest", TF32 otherwise.

    Raises:
        TypeError: float64 input, which the tiled backend takes.
        ValueError: input on the CPU, where only Triton's interpreter runs kernels.
    """
    return _outputs(batch)[0]


def total(batch: ContrastiveBatch, reduction: str) -> Tensor:
    """Returns the "sum" of ℓ_i, or their "mean" over the anchors that have a positive, in as few launches as can be."""
    each, _, _, vectors, _ = _outputs(batch)
    added = each.sum()  # an anchor without a positive adds 0
    if reduction == "sum":
        return added
    return added / (_keys_of_class(vectors, each.shape[0]) > 1).sum().clamp(min=1)


def forward_rows(batch: ContrastiveBatch, rows: int) -> RowLosses:
    """Returns ℓ_i and lse_i (base 2) of the first `rows` anchors [rows], and what else `backward_rows` reads.

    All anchors are keys; lse_i is +inf for an anchor without a positive. Raises as `losses` does.
    """
    inputs = _inputs(batch)
    each, lse, *packed = passes.forward(inputs, rows)
    # Without a row nothing is launched, nor counted.
    keys_of_class = _keys_of_class(packed[1], len(inputs.labels)) if rows else keys_per_class(batch)[batch.labels]
    return RowLosses(each, lse, keys_of_class, tuple(packed))


def backward_rows(
    batch: ContrastiveBatch, rows: int, saved: tuple[Any, ...], lse: Tensor, grad_losses: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes.

    lse and grad_losses g are of all anchors, [N] each.
    """
    wanted = (True, batch.prototypes is not None)
    options = BackwardOptions(batch.features.shape[1], batch.class_average, batch.normalize, _bounded(batch))
    for_features, for_prototypes = passes.backward(Packed(*saved), lse, grad_losses, options, wanted, rows)
    assert for_features is not None  # asked for
    return for_features, for_prototypes


def _keys_of_class(vectors: Tensor, N: int) -> Tensor:
    """Returns the keys of each anchor's class [N], itself one of them, of the packed vectors."""
    return vectors[2, :N]


def _outputs(batch: ContrastiveBatch) -> tuple[Tensor, ...]:
    """Returns what `passes.forward` does, the loss differentiable."""
    return (_forward_op if _is_traced() else _Loss.apply)(*_inputs(batch))


def _inputs(batch: ContrastiveBatch) -> KernelInputs:
    """Returns what `passes.forward` takes: rows of one dtype, and all contiguous."""
    features, prototypes = batch.features, batch.prototypes
    dtype = features.dtype if prototypes is None else torch.promote_types(features.dtype, prototypes.dtype)
    if dtype == torch.float64:
        raise TypeError('the triton backend accumulates in float32; for float64 inputs use backend="tiled"')
    if features.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('the triton backend needs a GPU, and features are on the CPU; use backend="tiled" there')
    return KernelInputs(
        features=features.to(dtype).contiguous(),
        prototypes=None if prototypes is None else prototypes.to(dtype).contiguous(),
        labels=batch.labels.contiguous(),
        class_counts=None if batch.class_counts is None else batch.class_counts.contiguous(),
        compression=None if batch.compression is None else batch.compression.contiguous(),
        root=_root(batch),
        num_classes=batch.num_classes,
        class_average=batch.class_average,
        normalize=batch.normalize,
        bounded=_bounded(batch),
    )


def _root(batch: ContrastiveBatch) -> float | Tensor:
    """Returns √(log2(e)/T), in traced code as a tensor."""
    if not _is_traced():
        return math.sqrt(math.log2(math.e) / batch.temperature)
    octaves = torch.full((), math.log2(math.e), dtype=torch.float64, device=batch.features.device)
    return (octaves / batch.temperature).sqrt().float()


def _bounded(batch: ContrastiveBatch) -> bool:
    return block_sizes.is_bounded(batch.temperature, batch.normalize, batch.compression, batch.class_counts)


def _is_traced() -> bool:
    """Returns whether something looks at the call through the dispatcher: torch.compile, make_fx, fake tensors."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


class _Loss(torch.autograd.Function):
    """Runs the kernels without the dispatcher; `torch.func` takes it too, as it does not take the operator."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return passes.forward(KernelInputs(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, output)

    @staticmethod
    @_FIRST_ONLY
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(KernelInputs._fields)
        *packed, lse, _ = ctx.saved_tensors
        if torch._C._functorch.is_functorch_wrapped_tensor(lse):
            return _differentiate(ctx, grad_output)  # wrappers of torch.func have no memory; operators take them off
        wanted = ctx.needs_input_grad[:2]
        return _for_all_inputs(passes.backward(Packed(*packed), lse, grad_output, ctx.options, wanted))


@torch.library.custom_op("rcl_fast::contrastive_loss", mutates_args=())
def _forward_op(
    features: Tensor,
    prototypes: Tensor | None,
    labels: Tensor,
    class_counts: Tensor | None,
    compression: Tensor | None,
    root: Tensor,
    num_classes: int,
    class_average: bool,
    normalize: bool,
    bounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return passes.forward(
        KernelInputs(
            *(features, prototypes, labels, class_counts, compression),
            *(root, num_classes, class_average, normalize, bounded),
        )
    )


@_forward_op.register_fake
def _(
    features: Tensor, prototypes: Tensor | None, labels: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, D = features.shape
    M = N + (0 if prototypes is None else prototypes.shape[0])
    return (
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(M, block_sizes.packed_width(D)),
        features.new_empty(4, M, dtype=torch.float32),
        labels.new_empty(M, dtype=torch.int32),
    )


@torch.library.custom_op("rcl_fast::contrastive_loss_backward", mutates_args=())
def _backward_op(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    width: int,
    class_average: bool,
    normalize: bool,
    bounded: bool,
    for_features: bool,
    for_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    options = BackwardOptions(width, class_average, normalize, bounded)
    wanted = (for_features, for_prototypes)
    gradients = passes.backward(Packed(keys, vectors, key_labels), lse, grad_output, options, wanted)
    none = keys.new_empty(0, width)  # an operator has no optional output
    return tuple(none.clone() if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@_backward_op.register_fake
def _(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    width: int,
    class_average: bool,
    normalize: bool,
    bounded: bool,
    for_features: bool,
    for_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    N, M = lse.shape[0], keys.shape[0]
    return keys.new_empty(N if for_features else 0, width), keys.new_empty(M - N if for_prototypes else 0, width)


@_FIRST_ONLY
def _differentiate(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Runs the backward pass as an operator."""
    *packed, lse, _ = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = _backward_op(*packed, lse, grad_output, *ctx.options, *wanted)
    return _for_all_inputs(gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True))


def _for_all_inputs(gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Returns the gradients of features and prototypes, and None for the other inputs."""
    return (*gradients, *(None,) * (len(KernelInputs._fields) - 2))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what `passes.backward` reads, and the losses, through which the gradient depends on the inputs."""
    losses, lse, *packed = output
    ctx.save_for_backward(*packed, lse, losses)
    given = KernelInputs(*inputs)
    ctx.options = BackwardOptions(given.features.shape[1], given.class_average, given.normalize, given.bounded)


_forward_op.register_autograd(_differentiate, setup_context=_save)
