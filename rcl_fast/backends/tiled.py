"""The loss in chunks of rows: O((N + C)·D) memory and one chunk, on any device; the fastest way on a CPU.

Only the log-sum-exp needs the N×M similarities; the mean over the positives comes from one sum of features a class.
The mathematics is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcl_fast.batch import (
    ContrastiveBatch,
    anchors_and_prototypes,
    class_log_weights,
    own_class_log_weights,
    positives_per_anchor,
)

# Bytes of one chunk of rows with its temporaries: a CPU wants it in cache, a GPU wants few launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def contrastive_loss(batch: ContrastiveBatch, chunk_bytes: int | None = None) -> Tensor:
    """ℓ_i for each anchor [N]; 0 for an anchor without a positive."""
    anchors, prototypes = anchors_and_prototypes(batch)
    log_sum_exp = _LogSumExp.apply(anchors, prototypes, _tiling(batch, anchors, prototypes, chunk_bytes))
    losses = log_sum_exp - _anchor_terms(batch, anchors, prototypes)
    return torch.where(positives_per_anchor(batch) > 0, losses, 0.0)


def weighted_contrastive_loss(batch: ContrastiveBatch, weights: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """Σ_i weights_i · ℓ_i, a scalar; weights [N] are constants, 0 for an anchor without a positive.

    The weights being known, the gradient is computed while a chunk's exponentials are at hand, so that nothing is
    computed twice.
    """
    if not torch.is_grad_enabled():
        return (weights * contrastive_loss(batch, chunk_bytes)).sum()
    anchors, prototypes = anchors_and_prototypes(batch)
    weights = weights.double()  # two sums of N terms whose difference is wanted: float64 costs nothing here
    log_sum_exp = _WeightedLogSumExp.apply(
        anchors, prototypes, weights, _tiling(batch, anchors, prototypes, chunk_bytes)
    )
    terms = (weights * _anchor_terms(batch, anchors, prototypes)).sum()
    return (log_sum_exp - terms).to(anchors.dtype)


def _anchor_terms(batch: ContrastiveBatch, anchors: Tensor, prototypes: Tensor) -> Tensor:
    """What ℓ_i takes from the log-sum-exp [N]: the mean of s_ip over the positives, and log n[y_i]."""
    class_sums = anchors.new_zeros(batch.num_classes, anchors.shape[1])
    class_sums = class_sums.index_add(0, batch.labels, anchors)
    if len(prototypes):
        class_sums = class_sums + prototypes
    positive_sums = class_sums[batch.labels] - anchors  # the anchor is not its own positive
    scale = batch.temperature * positives_per_anchor(batch).clamp(min=1).to(anchors.dtype)
    terms = (anchors * positive_sums).sum(dim=1) / scale
    if batch.class_counts is not None:
        terms = terms + batch.class_counts.to(anchors.dtype).log()[batch.labels]
    return terms


class _Tiling(NamedTuple):
    """The constants of the log-sum-exp: labels, the logarithmic weights b_ik, and rows to a chunk."""

    labels: Tensor  # [N]
    key_log_weights: Tensor  # [M] b of each key, as an anchor of another class meets it
    own_log_weights: Tensor | None  # [N] what b gains on keys of the own class; None: nothing
    temperature: float
    rows: int

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.labels), self.rows):
            yield slice(start, min(start + self.rows, len(self.labels)))

    def logits(self, chunk: slice, anchors: Tensor, keys: Tensor, key_log_weights: Tensor) -> Tensor:
        """s_ik + b_ik of a chunk's anchors with every key [rows, M], −inf where the key is the anchor itself."""
        N = len(self.labels)
        logits = torch.addmm(key_log_weights, anchors[chunk] / self.temperature, keys.T)
        if self.own_log_weights is not None:
            own = self.own_log_weights[chunk, None]
            logits[:, :N] += (self.labels[chunk, None] == self.labels) * own
            if len(keys) > N:
                logits[:, N:].scatter_add_(1, self.labels[chunk, None], own)
        logits[:, chunk].diagonal().fill_(-torch.inf)
        return logits


def _tiling(batch: ContrastiveBatch, anchors: Tensor, prototypes: Tensor, chunk_bytes: int | None) -> _Tiling:
    by_class = class_log_weights(batch)
    N, M = len(anchors), len(anchors) + len(prototypes)
    bytes_a_row = anchors.element_size() * (M + N) + N  # the logits, the own-class term and its mask
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(anchors.device.type, CHUNK_BYTES["cuda"])
    return _Tiling(
        labels=batch.labels,
        key_log_weights=torch.cat([by_class[batch.labels], by_class[: len(prototypes)]]),
        own_log_weights=own_class_log_weights(batch) if batch.class_average else None,
        temperature=batch.temperature,
        rows=max(1, chunk_bytes // max(1, bytes_a_row)),
    )


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits − pivot), in place; the pivot [rows, 1], finite also where a row has no key; the sums [rows, 1]."""
    pivots = logits.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    exponentials = logits.sub_(pivots).exp_()
    return exponentials, pivots, exponentials.sum(dim=1, keepdim=True)


class _WeightedLogSumExp(torch.autograd.Function):
    """Σ_i w_i lse_i, and its gradient in the same pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, prototypes: Tensor, weights: Tensor, tiling: _Tiling) -> Tensor:
        keys = torch.cat([anchors, prototypes])
        N = len(anchors)
        # Keys whose gradient is wanted: all, or the anchors alone where the prototypes are frozen or absent.
        wanted = len(keys) if ctx.needs_input_grad[1] else N
        with_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        gradient = torch.zeros_like(keys[:wanted]) if with_gradient else None
        total = weights.new_zeros(())
        for chunk in tiling.chunks():
            exponentials, pivots, sums = _exponentials(tiling.logits(chunk, anchors, keys, tiling.key_log_weights))
            # Without a key the sum is 0 and so is the weight: the clamp turns 0 · log 0 into 0.
            sums = sums.clamp(min=torch.finfo(sums.dtype).tiny)
            total += (weights[chunk, None] * (sums.log() + pivots)).sum()
            if gradient is not None:
                scale = weights[chunk, None].to(sums.dtype) / (sums * tiling.temperature)
                scaled = exponentials.mul_(scale)  # w_i p_ik / T
                gradient[chunk].addmm_(scaled, keys)
                gradient.addmm_(scaled[:, :wanted].T, anchors[chunk])
        ctx.save_for_backward(gradient)
        ctx.anchor_count = N
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient * upstream.to(gradient.dtype)
        for_prototypes = gradient[ctx.anchor_count :] if ctx.needs_input_grad[1] else None
        return gradient[: ctx.anchor_count], for_prototypes, None, None


class _LogSumExp(torch.autograd.Function):
    """lse_i of each anchor. Its gradient recomputes each chunk once and needs no transpose: rows own their sums."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, prototypes: Tensor, tiling: _Tiling) -> Tensor:
        keys = torch.cat([anchors, prototypes])
        log_sum_exp = anchors.new_empty(len(anchors))
        for chunk in tiling.chunks():
            _, pivots, sums = _exponentials(tiling.logits(chunk, anchors, keys, tiling.key_log_weights))
            log_sum_exp[chunk] = (sums.log() + pivots).squeeze(1)
        ctx.save_for_backward(anchors, prototypes, log_sum_exp)
        ctx.tiling = tiling
        return log_sum_exp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        anchors, prototypes, log_sum_exp = ctx.saved_tensors
        tiling: _Tiling = ctx.tiling
        keys = torch.cat([anchors, prototypes])
        N = len(anchors)
        # An anchor without a key has an lse of −inf and logits of −inf: any finite pivot gives exp(−inf) = 0.
        log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0)
        no_weights = torch.zeros_like(tiling.key_log_weights)
        for_anchors = torch.empty_like(anchors)
        for_prototypes = torch.zeros_like(prototypes) if ctx.needs_input_grad[1] else None
        for chunk in tiling.chunks():
            # s and the own-class gain are symmetric: with b of the other side they give G_ak and G_ka.
            symmetric = tiling.logits(chunk, anchors, keys, no_weights)
            columns = symmetric[:, :N] + tiling.key_log_weights[chunk, None]
            columns = columns.sub_(log_sum_exp).exp_().mul_(upstream)  # G_ka
            rows = symmetric.add_(tiling.key_log_weights)
            rows = rows.sub_(log_sum_exp[chunk, None]).exp_().mul_(upstream[chunk, None])  # G_ak
            if for_prototypes is not None:
                for_prototypes.addmm_(rows[:, N:].T, anchors[chunk], alpha=1 / tiling.temperature)
            rows[:, :N] += columns
            for_anchors[chunk] = rows @ keys / tiling.temperature
        return for_anchors, for_prototypes, None
