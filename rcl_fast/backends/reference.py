"""Computes the equations line by line, in float64: the oracle of every test. Slow and obvious on purpose.

Source: De Alvis, Denipitiyage, Seneviratne, "Long-Tail Learning with Rebalanced Contrastive Loss" (eq. 3-6).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rcl_fast.backends import from_losses
from rcl_fast.batch import ContrastiveBatch


def losses(batch: ContrastiveBatch) -> Tensor:
    """Returns ℓ_i for each anchor, float64 [N]; 0 for an anchor without a positive."""
    N, C = len(batch.features), batch.num_classes
    z = batch.features.double()
    y = batch.labels
    if batch.keys is not None and batch.key_labels is not None:
        z = torch.cat([z, batch.keys.double()])
        y = torch.cat([y, batch.key_labels])
    if batch.prototypes is not None:
        z = torch.cat([z, batch.prototypes.double()])
        y = torch.cat([y, torch.arange(C, device=y.device)])
    n = torch.ones(C, device=y.device) if batch.class_counts is None else batch.class_counts
    tau = torch.ones(C, device=y.device) if batch.compression is None else batch.compression
    n, tau = n.double(), tau.double()

    h = torch.stack([_unit(row) for row in z]) if batch.normalize and len(z) else z
    h = tau[y, None] * h
    rows = torch.arange(len(y), device=y.device)
    is_key = torch.ones_like(rows) > 0 if batch.anchors_are_keys else rows >= N

    each = []
    for i in range(N):
        keys = is_key & (rows != i)
        positives = (y == y[i]) & keys
        if not positives.any():
            each.append(z[i].sum() * 0)
            continue
        s_i = h @ (h[i] / batch.temperature)
        b_i = n[y].log()
        if batch.class_average:
            count_i = torch.stack([((y == j) & keys).sum() for j in y]).double()
            b_i = b_i - count_i.log()
        lse_i = torch.logsumexp((s_i + b_i)[keys], dim=0)
        each.append(lse_i - s_i[positives].mean() - n[y[i]].log())
    return torch.stack(each) if each else z.sum(dim=1)[:0]


def _unit(row: Tensor) -> Tensor:
    """Returns row / ‖row‖, and a zero row as it is; the squares of the row itself may leave even float64's range."""
    shrunk = row / (row.detach().abs().max() or 1)
    return shrunk / (shrunk.norm() or 1)


total = partial(from_losses.total, losses)
forward_rows = partial(from_losses.forward_rows, losses)
backward_rows = partial(from_losses.backward_rows, losses)
