"""The loss through the Triton kernels, as one opaque operator forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcl_fast.batch import ContrastiveBatch
from rcl_fast.kernels import launch


def contrastive_loss(batch: ContrastiveBatch) -> Tensor:
    """ℓ_i for each anchor, float32 [N]; 0 for an anchor without a positive. O((N + C)·D) memory.

    Differentiable once, in features and prototypes; the same bits every run. float32 products follow
    `torch.get_float32_matmul_precision()`: exact at "highest", TF32 otherwise.

    Raises:
        TypeError: float64 input, which the tiled backend takes.
    """
    features, prototypes = batch.features, batch.prototypes
    dtype = features.dtype if prototypes is None else torch.promote_types(features.dtype, prototypes.dtype)
    if dtype == torch.float64:
        raise TypeError('the triton backend accumulates in float32; for float64 inputs use backend="tiled"')
    features = features.to(dtype).contiguous()
    if prototypes is not None:
        prototypes = prototypes.to(dtype).contiguous()
    arguments = (
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
    if _is_plain(features):
        return _Loss.apply(*arguments)
    return _forward_op(*arguments)[0]


def _is_plain(features: Tensor) -> bool:
    """Whether nothing traces, wraps or transforms this call, so that the dispatcher has nothing to add."""
    return (
        not torch.compiler.is_compiling()
        and type(features) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Loss(torch.autograd.Function):
    """The operator without the dispatcher's overhead, for eager calls."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        outputs = launch.forward(*arguments)
        ctx.set_materialize_grads(False)
        _save(ctx, arguments, outputs)
        return outputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if upstream is None:
            return (None,) * 9
        gradients = launch.backward(*_saved(ctx, upstream), *ctx.needs_input_grad[:2])
        return *gradients, *(None,) * 7


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
    return launch.forward(
        features, prototypes, labels, class_counts, compression, num_classes, temperature, class_average, normalize
    )


@_forward_op.register_fake
def _(
    features: Tensor, prototypes: Tensor | None, labels: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, D = features.shape
    M = N + (0 if prototypes is None else prototypes.shape[0])
    rows = M if launch.must_pack(features, prototypes) else 0
    return (
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(N, dtype=torch.float32),
        features.new_empty(rows, launch.packed_width(D)),
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
    temperature: float,
    class_average: bool,
    normalize: bool,
    compressed: bool,
    for_features: bool,
    for_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    gradients = launch.backward(
        keys, vectors, key_labels, lse, upstream, width, temperature, class_average, normalize, compressed,
        for_features, for_prototypes,
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
    temperature: float,
    class_average: bool,
    normalize: bool,
    compressed: bool,
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
    """Keep what `launch.backward` reads; the features only where they are the keys."""
    features, prototypes, _, _, compression, _, temperature, class_average, normalize = inputs
    _, lse, keys, vectors, key_labels = outputs
    if not launch.must_pack(features, prototypes):
        keys = features
    ctx.save_for_backward(keys, vectors, key_labels, lse)
    ctx.options = (features.shape[1], temperature, class_average, normalize, compression is not None)


def _saved(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return *ctx.saved_tensors, upstream, *ctx.options
