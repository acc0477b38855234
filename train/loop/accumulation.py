"""A batch in parts, with the loss of the whole batch and the memory of a part (GradCache: Gao et al., 2021).

A contrastive loss compares all images of the batch, so the losses of its parts do not add up to it. Hence two passes:

1. Every part goes forward, and only its logits and embeddings are kept. The loss is computed from those of all parts in
   all processes together, with its gradient by each logit, embedding and prototype.
2. Every part goes forward again, as in the first pass (dropout samples the same), and backward from its share of that
   gradient. The gradients of the parameters add up to those of the whole batch's loss.

One thing differs from a step without parts: BatchNorm normalises each part by itself. Its running statistics change in
the second pass alone, once for each part. The prototypes are computed once in each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcl_fast.train.network.ddp import preserved
from rcl_fast.train.network.models import LongTailedClassifier, Outputs
from rcl_fast.train.network.objective import LossParts
from rcl_fast.train.runtime import rng_state
from rcl_fast.train.runtime.hardware import Runtime


def backward_in_parts(
    network: nn.Module,
    model: LongTailedClassifier,
    runtime: Runtime,
    views: list[Tensor],
    parts: int,
    loss_of: Callable[[Outputs], tuple[LossParts, Tensor]],
) -> LossParts:
    """Adds the gradient of the whole batch's loss to the parameters' `grad`; returns the loss's parts.

    Args:
        network: `model`, or the DistributedDataParallel around it.
        views: [B, 3, S, S] each.
        loss_of: whole batch's outputs -> loss, and the tensor to go backward from (the total, scaled).
    """
    cut = [list(part) for part in zip(*(view.tensor_split(min(parts, len(view))) for view in views), strict=True)]
    outputs, states = _without_gradient(model, runtime, cut)
    loss, gradients = _loss_gradients(outputs, loss_of)
    end = len(cut) - 1
    for number, (part, state, gradient) in enumerate(zip(cut, states, _shares(gradients, cut), strict=True)):
        rng_state.restore(state, runtime.device)
        with nullcontext() if number == end else _no_sync(network):
            with runtime.autocast():
                again = network(part, with_prototypes=number == end)
            pairs = [(o, g) for o, g in zip(again, gradient, strict=True) if o is not None and g is not None]
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    return loss


def _without_gradient(
    model: LongTailedClassifier, runtime: Runtime, cut: list[list[Tensor]]
) -> tuple[Outputs, list[dict[str, Any]]]:
    """Returns the whole batch's outputs, and the random state before each part."""
    states, outputs = [], []
    with torch.no_grad(), preserved(model.buffers()), runtime.autocast():
        for number, part in enumerate(cut):
            states.append(rng_state.state(runtime.device))
            outputs.append(model(part, with_prototypes=number == len(cut) - 1))
    embeddings = [part.embeddings for part in outputs if part.embeddings is not None]
    whole = Outputs(
        torch.cat([part.logits for part in outputs]),
        torch.cat(embeddings) if embeddings else None,
        outputs[-1].prototypes,
    )
    return whole, states


def _loss_gradients(
    outputs: Outputs, loss_of: Callable[[Outputs], tuple[LossParts, Tensor]]
) -> tuple[LossParts, Outputs]:
    """Returns the loss, and its gradient by each output."""
    leaves = Outputs(*map(_leaf, outputs))  # type: ignore[arg-type]  # the logits are never None
    loss, root = loss_of(leaves)
    root.backward()
    return loss, Outputs(*(None if leaf is None else leaf.grad for leaf in leaves))  # type: ignore[arg-type]  # as above


def _leaf(output: Tensor | None) -> Tensor | None:
    return None if output is None else output.detach().requires_grad_()


def _shares(gradients: Outputs, cut: list[list[Tensor]]) -> list[Outputs]:
    """Returns the gradient of each part's outputs; that of the prototypes goes with the last part."""
    sizes = [len(part[0]) for part in cut]
    logits = gradients.logits.split(sizes)
    embeddings = [None] * len(cut) if gradients.embeddings is None else gradients.embeddings.split(sizes)
    prototypes = [None] * (len(cut) - 1) + [gradients.prototypes]
    return [Outputs(*share) for share in zip(logits, embeddings, prototypes, strict=True)]


def _no_sync(network: nn.Module) -> AbstractContextManager[Any]:
    """Keeps the gradients of a backward pass inside in this process: they are averaged with the last part's."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
