"""The loss through the Triton kernels, as one opaque operator forward and one backward."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from rcl_fast.batch import ContrastiveBatch
from rcl_fast.kernels import block_sizes, passes


def contrastive_loss(batch: ContrastiveBatch) -> Tensor:
    """ℓ_i for each anchor, float32 [N]; 0 for an anchor without a positive. O((N + C)·D) memory.

    Differentiable once, in features and prototypes; the same bits every run. float32 products follow
    `torch.get_float32_matmul_precision()`: exact at "highest", TF32 otherwise.

    Raises:
        TypeError: float64 input, which the tiled backend takes.
        ValueError: input on the CPU, where only Triton's interpreter runs kernels.
    """
    return _outputs(batch)[0]


def reduced_contrastive_loss(batch: ContrastiveBatch, reduction: str) -> Tensor:
    """The "sum" of ℓ_i, or their "mean" over the anchors that have a positive, in as few launches as there can be."""
    losses, _, _, vectors, _ = _outputs(batch)
    total = losses.sum()  # an anchor without a positive adds 0
    if reduction == "sum":
        return total
    keys_of_own_class = vectors[2, : losses.shape[0]]  # the anchor is one of them
    return total / (keys_of_own_class > 1).sum().clamp(min=1)


def forward_rows(batch: ContrastiveBatch, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """ℓ_i and lse_i (base 2) of the first `rows` anchors [rows], and what `backward_rows` reads; all anchors are keys.

    Raises as `contrastive_loss` does.
    """
    arguments = _arguments(batch)
    losses, lse, keys, vectors, key_labels = passes.forward(*arguments, rows=rows)
    if not block_sizes.must_pack(*arguments[:2]):
        keys = arguments[0]
    return losses, lse, (keys, vectors, key_labels)


def backward_rows(
    batch: ContrastiveBatch, rows: int, saved: tuple[Tensor, ...], lse: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes.

    lse and upstream g are of all anchors, [N] each.
    """
    bounded = block_sizes.is_bounded(batch.temperature, batch.normalize, batch.compression is not None)
    for_features, for_prototypes = passes.backward(
        *saved, lse, upstream, batch.features.shape[1], batch.class_average, batch.normalize, bounded,
        True, batch.prototypes is not None, rows=rows,
    )  # fmt: skip
    assert for_features is not None  # asked for
    return for_features, for_prototypes


def _outputs(batch: ContrastiveBatch) -> tuple[Tensor, ...]:
    """What `passes.forward` returns, the loss differentiable."""
    return (_forward_op if _is_traced() else _Loss.apply)(*_arguments(batch))


def _arguments(batch: ContrastiveBatch) -> tuple[Any, ...]:
    """Those of `passes.forward`: of one dtype, and contiguous."""
    features, prototypes = batch.features, batch.prototypes
    dtype = features.dtype if prototypes is None else torch.promote_types(features.dtype, prototypes.dtype)
    if dtype == torch.float64:
        raise TypeError('the triton backend accumulates in float32; for float64 inputs use backend="tiled"')
    if features.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('the triton backend needs a GPU, and features are on the CPU; use backend="tiled" there')
    features = features.to(dtype).contiguous()
    if prototypes is not None:
        prototypes = prototypes.to(dtype).contiguous()
    return (
        features,
        prototypes,
        batch.labels.contiguous(),
        None if batch.class_counts is None else batch.class_counts.contiguous(),
        None if batch.compression is None else batch.compression.contiguous(),
        batch.num_classes,
        batch.temperature,
        batch.class_average,
        batch.normalize,
    )


def _is_traced() -> bool:
    """Whether something looks at the call through the dispatcher: torch.compile, make_fx, fake tensors."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


class _Loss(torch.autograd.Function):
    """The operator without the dispatcher's overhead; `torch.func` takes it too."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return passes.forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        # Inside a transform the tensors are wrappers without memory; a Function takes the wrapping off.
        backward = _Gradients.apply if torch._C._functorch.peek_interpreter_stack() else passes.backward
        gradients = backward(*_saved(ctx, upstream), *ctx.needs_input_grad[:2])
        return *gradients, *(None,) * 7


class _Gradients(torch.autograd.Function):
    """The backward pass under `torch.func`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return passes.backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.mark_non_differentiable(*(gradient for gradient in output if gradient is not None))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("the triton backend is differentiable once; for a second derivative use backend='dense'")


@torch.library.custom_op("rcl_fast::contrastive_loss", mutates_args=())
def _forward_op(
    features: Tensor,
    prototypes: Tensor | None,
    labels: Tensor,
    class_counts: Tensor | None,
    compression: Tensor | None,
    num_classes: int,
    temperature: float,
    class_average: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return passes.forward(
        features, prototypes, labels, class_counts, compression, num_classes, temperature, class_average, normalize
    )


@_forward_op.register_fake
def _(
    features: Tensor, prototypes: Tensor | None, labels: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, D = features.shape
    M = N + (0 if prototypes is None else prototypes.shape[0])
    rows = M if block_sizes.must_pack(features, prototypes) else 0
    return (
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(rows, block_sizes.packed_width(D)),
        features.new_empty(3, M, dtype=torch.float32),
        labels.new_empty(M, dtype=torch.int32),
    )


@torch.library.custom_op("rcl_fast::contrastive_loss_backward", mutates_args=())
def _backward_op(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    upstream: Tensor,
    width: int,
    class_average: bool,
    normalize: bool,
    bounded: bool,
    for_features: bool,
    for_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    gradients = passes.backward(
        keys, vectors, key_labels, lse, upstream, width, class_average, normalize, bounded, for_features, for_prototypes
    )  # fmt: skip
    none = keys.new_empty(0, width)  # an operator has no optional output
    return tuple(none.clone() if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@_backward_op.register_fake
def _(
    keys: Tensor,
    vectors: Tensor,
    key_labels: Tensor,
    lse: Tensor,
    upstream: Tensor,
    width: int,
    class_average: bool,
    normalize: bool,
    bounded: bool,
    for_features: bool,
    for_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    N, M = lse.shape[0], keys.shape[0]
    return keys.new_empty(N if for_features else 0, width), keys.new_empty(M - N if for_prototypes else 0, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    gradients = _backward_op(*_saved(ctx, upstream), *wanted)
    return *(gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)), *(None,) * 7


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keep what `passes.backward` reads; the features only where they are the keys."""
    features, prototypes, _, _, compression, _, temperature, class_average, normalize = inputs
    _, lse, keys, vectors, key_labels = outputs
    if not block_sizes.must_pack(features, prototypes):
        keys = features
    ctx.save_for_backward(keys, vectors, key_labels, lse)
    bounded = block_sizes.is_bounded(temperature, normalize, compression is not None)
    ctx.options = (features.shape[1], class_average, normalize, bounded)


def _saved(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return *ctx.saved_tensors, upstream, *ctx.options
