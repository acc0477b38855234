"""Batches for the kernels' tests, and the judgement of a result against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcl_fast import reference
from rcl_fast.backends import triton as backend
from rcl_fast.batch import ContrastiveBatch, class_log_weights, own_class_log_weights, positives_per_anchor

PRESETS = {
    "scl": {"class_average": False, "rebalance": False, "with_prototypes": False},
    "bcl": {"class_average": True, "rebalance": False, "with_prototypes": True},
    "scl_rcl": {"class_average": False, "rebalance": True, "with_prototypes": False},
    "bcl_rcl": {"class_average": True, "rebalance": True, "with_prototypes": True},
}


def random_batch(
    device: torch.device,
    N: int = 50,
    C: int = 37,
    D: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    class_average: bool = True,
    rebalance: bool = True,
    with_prototypes: bool = True,
    compressed: bool = False,
    normalize: bool = True,
    temperature: float = 0.1,
    labels: Tensor | None = None,
    seed: int = 0,
) -> ContrastiveBatch:
    """A batch of raw features of unequal lengths, with labels of unequal frequency."""
    make = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        lengths = 0.3 + 3 * torch.rand(count, 1, generator=make)
        if not normalize:
            lengths = lengths / D**0.5
        return (torch.randn(count, D, generator=make) * lengths).to(device, dtype).requires_grad_()

    if labels is None:
        labels = (C * torch.rand(N, generator=make) ** 3).long().clamp(max=C - 1)
    return ContrastiveBatch(
        features=rows(N),
        labels=labels.to(device),
        prototypes=rows(C) if with_prototypes else None,
        class_counts=torch.randint(1, 500, (C,), generator=make).to(device) if rebalance else None,
        compression=(0.2 + torch.rand(C, generator=make)).to(device) if compressed else None,
        num_classes=C,
        temperature=temperature,
        class_average=class_average,
        normalize=normalize,
    )


def leaves(batch: ContrastiveBatch) -> list[Tensor]:
    """The tensors whose gradient is wanted."""
    return [rows for rows in (batch.features, batch.prototypes) if rows is not None and rows.requires_grad]


def upstream_of(batch: ContrastiveBatch) -> Tensor:
    """Weights of the anchors, none of them 1, some negative and one 0."""
    return torch.linspace(-0.6, 1.7, len(batch.labels), device=batch.labels.device).index_fill(
        0, torch.zeros(1, dtype=torch.int64, device=batch.labels.device), 0.0
    )


def loss_and_gradients(loss: Any, batch: ContrastiveBatch, upstream: Tensor | None = None) -> list[Tensor]:
    """[ℓ, and the gradient of each leaf], as `loss` computes them."""
    losses = loss(batch)
    upstream = upstream_of(batch) if upstream is None else upstream
    wanted = leaves(batch)
    if not wanted:
        return [losses]
    return [losses.detach(), *torch.autograd.grad(losses, wanted, upstream.to(losses.dtype))]


def plain(batch: ContrastiveBatch) -> Tensor:
    """The loss as plain PyTorch computes it with every product in the inputs' own dtype."""
    dtype = batch.features.dtype
    keys, labels = batch.features, batch.labels
    if batch.prototypes is not None:
        keys = torch.cat([keys, batch.prototypes])
        labels = torch.cat([labels, torch.arange(len(batch.prototypes), device=labels.device)])
    if batch.normalize:
        keys = torch.nn.functional.normalize(keys, dim=1)
    if batch.compression is not None:
        keys = keys * batch.compression.to(dtype)[labels, None]
    N, M = len(batch.features), len(keys)
    s = (keys[:N] @ keys.T).float() / batch.temperature
    same = batch.labels[:, None] == labels
    itself = torch.eye(N, M, dtype=torch.bool, device=s.device)
    b = class_log_weights(batch)[labels].expand(N, M)
    if batch.class_average:
        b = b + same * own_class_log_weights(batch)[:, None]
    positives = positives_per_anchor(batch)
    lse = torch.logsumexp((s + b).masked_fill(itself & (positives > 0)[:, None], -torch.inf), dim=1)
    mean = (s * (same & ~itself)).sum(dim=1) / positives.clamp(min=1)
    log_n = 0.0 if batch.class_counts is None else batch.class_counts.float().log()[batch.labels]
    return torch.where(positives > 0, lse - mean - log_n, 0.0)


def assert_as_exact_as_plain(
    batch: ContrastiveBatch,
    upstream: Tensor | None = None,
    factor: float = 2.0,
    truth: Callable[[ContrastiveBatch], Tensor] = reference.contrastive_loss,
    loss: Callable[[ContrastiveBatch], Tensor] = backend.contrastive_loss,
) -> None:
    """Our error against float64 is at most `factor` of plain PyTorch's in the same dtype, and rounding.

    Rounding: a result is a sum of some magnitude, kept in float32 and stored in its dtype; one unit in the last place
    of that magnitude for storing it, and sixteen in float32, for what happens to be exact in plain PyTorch.
    """
    exactly = loss_and_gradients(truth, batch, upstream)
    ours = loss_and_gradients(loss, batch, upstream)
    theirs = loss_and_gradients(plain, batch, upstream)
    log_n = 0.0 if batch.class_counts is None else float(batch.class_counts.double().log().max())
    for name, exact, our, their in zip(("loss", "features", "prototypes"), exactly, ours, theirs, strict=False):
        assert our.shape == exact.shape, name
        if exact.numel() == 0:
            continue
        assert our.isfinite().all(), f"{name}: not finite"
        # The terms of the loss cancel: its own magnitude is no measure of them.
        magnitude = float(exact.abs().max()) + (1 / batch.temperature + log_n if name == "loss" else 0.0)
        rounding = (torch.finfo(our.dtype).eps + 16 * torch.finfo(torch.float32).eps) * magnitude
        our_error = float((our.double() - exact).abs().max())
        their_error = float((their.double() - exact).abs().max())
        assert our_error <= factor * their_error + rounding, f"{name}: {our_error:.2e}, plain {their_error:.2e}"
