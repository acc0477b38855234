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
from rcl_fast.batch import ContrastiveBatch, input_dtype
from rcl_fast.class_statistics import positives_per_anchor
from rcl_fast.kernels import block_sizes, passes
from rcl_fast.kernels.pack import KernelInputs, Packed, Sections
from rcl_fast.kernels.passes import BackwardOptions
from rcl_fast.kernels.tiles import POSITIVES

_FIRST_ONLY = first_derivative_only("backend='triton'")


def losses(batch: ContrastiveBatch) -> Tensor:
    """Returns ℓ_i for each anchor, float32 [N]; 0 for an anchor without a positive. O((N + Q + C)·D) memory.

    Differentiable once, in features, keys and prototypes; the same bits every run. float32 products follow
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
    return added / (_positives(vectors, each.shape[0]) > 0).sum().clamp(min=1)


def forward_rows(batch: ContrastiveBatch, rows: int) -> RowLosses:
    """Returns ℓ_i and lse_i (base 2) of the first `rows` anchors [rows], and what else `backward_rows` reads.

    The keys are everyone's; lse_i is +inf for an anchor without a positive. Raises as `losses` does.
    """
    inputs = _inputs(batch)
    each, lse, *packed = passes.forward(inputs, rows)
    # Without a row nothing is launched, nor counted.
    positives = _positives(packed[1], len(inputs.labels)) if rows else positives_per_anchor(batch)
    return RowLosses(each, lse, positives, tuple(packed))


def backward_rows(
    batch: ContrastiveBatch, rows: int, saved: tuple[Any, ...], lse: Tensor, grad_losses: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the others.

    lse and grad_losses g are of all anchors, [N] each.
    """
    wanted = (True, batch.keys is not None and batch.keys.requires_grad, batch.prototypes is not None)
    options = _backward_options(batch)
    for_features, for_keys, for_prototypes = passes.backward(Packed(*saved), lse, grad_losses, options, wanted, rows)
    assert for_features is not None  # asked for
    return for_features, for_prototypes, for_keys


def _backward_options(batch: ContrastiveBatch) -> BackwardOptions:
    return BackwardOptions(
        width=batch.features.shape[1],
        anchors=len(batch.features),
        extra_keys=0 if batch.keys is None else len(batch.keys),
        prototypes=0 if batch.prototypes is None else len(batch.prototypes),
        anchors_are_keys=batch.anchors_are_keys,
        class_average=batch.class_average,
        normalize=batch.normalize,
        bounded=_bounded(batch),
    )


def _positives(vectors: Tensor, N: int) -> Tensor:
    """Returns |P(i)| of each anchor, float32 [N], of the packed vectors."""
    return vectors[POSITIVES.value, :N]


def _outputs(batch: ContrastiveBatch) -> tuple[Tensor, ...]:
    """Returns what `passes.forward` does, the loss differentiable."""
    return (_forward_op if _is_traced() else _Loss.apply)(*_inputs(batch))


def _inputs(batch: ContrastiveBatch) -> KernelInputs:
    """Returns what `passes.forward` takes: rows of one dtype, and all contiguous."""
    dtype = input_dtype(batch)
    if dtype == torch.float64:
        raise TypeError('the triton backend accumulates in float32; for float64 inputs use backend="tiled"')
    if batch.features.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('the triton backend needs a GPU, and features are on the CPU; use backend="tiled" there')

    def contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()

    return KernelInputs(
        features=batch.features.to(dtype).contiguous(),
        extra_keys=contiguous(batch.keys, dtype),
        prototypes=contiguous(batch.prototypes, dtype),
        labels=batch.labels.contiguous(),
        extra_labels=contiguous(batch.key_labels),
        class_counts=contiguous(batch.class_counts),
        compression=contiguous(batch.compression),
        root=_root(batch),
        num_classes=batch.num_classes,
        anchors_are_keys=batch.anchors_are_keys,
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
    at_most_one = batch.compression is None or batch.factors_at_most_one
    return block_sizes.is_bounded(batch.temperature, batch.normalize, at_most_one, batch.class_counts)


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
        wanted = ctx.needs_input_grad[:3]
        return _for_all_inputs(passes.backward(Packed(*packed), lse, grad_output, ctx.options, wanted))


@torch.library.custom_op("rcl_fast::contrastive_loss", mutates_args=())
def _forward_op(
    features: Tensor,
    extra_keys: Tensor | None,
    prototypes: Tensor | None,
    labels: Tensor,
    extra_labels: Tensor | None,
    class_counts: Tensor | None,
    compression: Tensor | None,
    root: Tensor,
    num_classes: int,
    anchors_are_keys: bool,
    class_average: bool,
    normalize: bool,
    bounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return passes.forward(
        KernelInputs(
            *(features, extra_keys, prototypes, labels, extra_labels, class_counts, compression, root),
            *(num_classes, anchors_are_keys, class_average, normalize, bounded),
        )
    )


@_forward_op.register_fake
def _(
    features: Tensor, extra_keys: Tensor | None, prototypes: Tensor | None, labels: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, Q, C = (0 if rows is None else rows.shape[0] for rows in (features, extra_keys, prototypes))
    P = Sections(N, Q, C).starts[-1]
    return (
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(P, block_sizes.packed_width(features.shape[1])),
        features.new_empty(6, P, dtype=torch.float32),
        labels.new_empty(P, dtype=torch.int32),
    )


@torch.library.custom_op("rcl_fast::contrastive_loss_backward", mutates_args=())
def _backward_op(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    sizes: list[int],
    flags: list[bool],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    width, anchors, extra_keys, prototypes = sizes
    options = BackwardOptions(width, anchors, extra_keys, prototypes, *flags)
    for_features, for_extra_keys, for_prototypes = wanted
    packed, wants = Packed(keys, vectors, key_labels), (for_features, for_extra_keys, for_prototypes)
    gradients = passes.backward(packed, lse, grad_output, options, wants)
    none = keys.new_empty(0, width)  # an operator has no optional output
    return tuple(none.clone() if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@_backward_op.register_fake
def _(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    sizes: list[int],
    flags: list[bool],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    width, *rows = sizes
    return tuple(  # type: ignore[return-value]
        keys.new_empty(count if wants else 0, width) for count, wants in zip(rows, wanted, strict=True)
    )


@_FIRST_ONLY
def _differentiate(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Runs the backward pass as an operator."""
    *packed, lse, _ = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    sizes, flags = list(ctx.options[:4]), list(ctx.options[4:])
    gradients = _backward_op(*packed, lse, grad_output, sizes, flags, wanted)
    return _for_all_inputs(gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True))


def _for_all_inputs(gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Returns the gradients of features, extra keys and prototypes, and None for the other inputs."""
    return (*gradients, *(None,) * (len(KernelInputs._fields) - 3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what `passes.backward` reads, and the losses, through which the gradient depends on the inputs."""
    losses, lse, *packed = output
    ctx.save_for_backward(*packed, lse, losses)
    ctx.options = BackwardOptions.of(KernelInputs(*inputs))


_forward_op.register_autograd(_differentiate, setup_context=_save)
