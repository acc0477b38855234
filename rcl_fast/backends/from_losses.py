"""Makes the rest of a backend from its losses of all anchors: obvious, and as much work in each process as in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcl_fast.backends.protocol import RowLosses
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.class_statistics import positives_per_anchor, reduction_weights

Losses = Callable[[ContrastiveBatch], Tensor]


def total(losses: Losses, batch: ContrastiveBatch, reduction: str) -> Tensor:
    """Returns the "sum" of the losses, or their "mean" over the anchors that have a positive."""
    each = losses(batch)
    return (each * reduction_weights(positives_per_anchor(batch), reduction).to(each.dtype)).sum()


def forward_rows(losses: Losses, batch: ContrastiveBatch, rows: int) -> RowLosses:
    """Returns the losses of the first `rows` anchors. Nothing of their softmax: autograd needs none."""
    each = losses(batch)[:rows]
    return RowLosses(each, each.new_empty(len(each), 0), positives_per_anchor(batch), ())


def backward_rows(
    losses: Losses, batch: ContrastiveBatch, rows: int, saved: tuple[()], softmax: Tensor, grad_losses: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes and
    by the keys."""
    with torch.enable_grad():
        features, prototypes, keys = (
            None if leaf is None else leaf.detach().requires_grad_()
            for leaf in (batch.features, batch.prototypes, batch.keys)
        )
        assert features is not None
        each = losses(batch._replace(features=features, prototypes=prototypes, keys=keys))
    (for_features,) = torch.autograd.grad(each, features, grad_losses, retain_graph=True)
    is_first = torch.arange(len(grad_losses), device=grad_losses.device) < rows
    local = torch.where(is_first, grad_losses, 0.0)
    for_prototypes, for_keys = (
        None if leaf is None else torch.autograd.grad(each, leaf, local, retain_graph=True)[0]
        for leaf in (prototypes, keys)
    )
    return for_features[:rows], for_prototypes, for_keys
