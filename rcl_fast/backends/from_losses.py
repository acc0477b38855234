"""Makes the rest of a backend from its losses of all anchors: obvious, and as much work in each process as in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcl_fast.backends.protocol import RowLosses
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.class_statistics import keys_per_class, positives_per_anchor, reduction_weights

Losses = Callable[[ContrastiveBatch], Tensor]


def total(losses: Losses, batch: ContrastiveBatch, reduction: str) -> Tensor:
    """Returns the "sum" of the losses, or their "mean" over the anchors that have a positive."""
    each = losses(batch)
    return (each * reduction_weights(positives_per_anchor(batch), reduction).to(each.dtype)).sum()


def forward_rows(losses: Losses, batch: ContrastiveBatch, rows: int) -> RowLosses:
    """Returns the losses of the first `rows` anchors. Nothing of their softmax: autograd needs none."""
    each = losses(batch)[:rows]
    return RowLosses(each, each.new_empty(len(each), 0), keys_per_class(batch)[batch.labels], ())


def backward_rows(
    losses: Losses, batch: ContrastiveBatch, rows: int, saved: tuple[()], softmax: Tensor, grad_losses: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes."""
    with torch.enable_grad():
        batch = batch._replace(features=batch.features.detach().requires_grad_())
        if batch.prototypes is not None:
            batch = batch._replace(prototypes=batch.prototypes.detach().requires_grad_())
        each = losses(batch)
    (for_features,) = torch.autograd.grad(each, batch.features, grad_losses, retain_graph=True)
    if batch.prototypes is None:
        return for_features[:rows], None
    is_first = torch.arange(len(grad_losses), device=grad_losses.device) < rows
    (for_prototypes,) = torch.autograd.grad(each, batch.prototypes, torch.where(is_first, grad_losses, 0.0))
    return for_features[:rows], for_prototypes
