"""The loss in chunks of rows: O((N + C)·D) memory and one chunk, on CPU and CUDA; the fastest way on a CPU.

Only the log-sum-exp needs the N×M similarities; the mean over the positives comes from one sum of features a class.
The mathematics is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcl_fast.backends.tiled_keys import AccumulatedKeys, RawKeys, keys_of, multiplies_16_bits
from rcl_fast.batch import (
    ContrastiveBatch,
    anchors_and_prototypes,
    class_log_weights,
    own_class_log_weights,
    positives_per_anchor,
    ranks,
    row_products,
    without_autocast,
)

# Bytes of one chunk of rows with its temporaries: a CPU wants it in cache, a GPU wants few launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def contrastive_loss(batch: ContrastiveBatch, chunk_bytes: int | None = None) -> Tensor:
    """ℓ_i for each anchor [N]; 0 for an anchor without a positive."""
    anchors, prototypes = anchors_and_prototypes(batch)
    log_sum_exp = _LogSumExp.apply(anchors, prototypes, _tiling(batch, anchors, prototypes, chunk_bytes))
    return _losses(batch, anchors, prototypes, log_sum_exp)


def weighted_contrastive_loss(batch: ContrastiveBatch, weights: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """Σ_i weights_i · ℓ_i, a scalar; weights [N] are constants, 0 for an anchor without a positive.

    The weights being known, the gradient is computed while a chunk's exponentials are at hand, so that nothing is
    computed twice. Not in 16 bits, where the columns' part would need weights rounded once more.
    """
    if not torch.is_grad_enabled() or multiplies_16_bits(batch):
        losses = contrastive_loss(batch, chunk_bytes)
        return (weights * losses).sum().to(losses.dtype)
    anchors, prototypes = anchors_and_prototypes(batch)
    weights = weights.double()  # sums of N terms whose small difference is wanted: float64 costs nothing here
    tiling = _tiling(batch, anchors, prototypes, chunk_bytes)
    loss = _WeightedLoss.apply(anchors, prototypes, weights, _positive_scale(batch), tiling)
    return (loss - (weights * _anchor_log_counts(batch)).sum()).to(anchors.dtype)


def forward_rows(batch: ContrastiveBatch, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """ℓ_i and lse_i of the first `rows` anchors [rows], and what `backward_rows` reads; all anchors are keys."""
    anchors, prototypes = anchors_and_prototypes(batch)
    log_sum_exp = _log_sum_exp(_tiling(batch, anchors, prototypes, anchors_wanted=rows))
    return _losses(batch, anchors, prototypes, log_sum_exp), log_sum_exp, (anchors, prototypes)


def backward_rows(
    batch: ContrastiveBatch, rows: int, saved: tuple[Tensor, ...], log_sum_exp: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes.

    log_sum_exp and upstream g are of all anchors, [N] each.
    """
    anchors, prototypes = saved
    upstream = torch.where(positives_per_anchor(batch) > 0, upstream, 0.0)
    tiling = _tiling(batch, anchors, prototypes, anchors_wanted=rows)
    for_anchors, for_prototypes = _log_sum_exp_gradients(log_sum_exp, upstream, tiling)
    classes = ranks(batch.labels)
    positives = _positive_sums(anchors, prototypes, batch.labels, classes)
    shares = (upstream / _positive_scale(batch)).to(anchors.dtype)[:, None]
    _subtract_positives(for_anchors, for_prototypes, anchors, positives, shares, batch.labels, classes, rows)
    with torch.enable_grad():
        raw = [batch.features[:rows].detach().requires_grad_()]
        if batch.prototypes is not None:
            raw.append(batch.prototypes.detach().requires_grad_())
        own = batch._replace(labels=batch.labels[:rows], features=raw[0], prototypes=raw[1] if raw[1:] else None)
        compressed = anchors_and_prototypes(own)
    gradients = zip(compressed, raw, (for_anchors, for_prototypes), strict=False)
    for_raw = [torch.autograd.grad(output, leaf, gradient)[0] for output, leaf, gradient in gradients]
    return for_raw[0], for_raw[1] if for_raw[1:] else None


def _losses(batch: ContrastiveBatch, anchors: Tensor, prototypes: Tensor, log_sum_exp: Tensor) -> Tensor:
    """ℓ_i of the first anchors, as many as there are lse_i."""
    wanted = slice(len(log_sum_exp))
    positives = _positive_sums(anchors, prototypes, batch.labels, ranks(batch.labels))
    # Not a matrix product: autograd would run its backward in 16 bits where users call that inside autocast.
    similarity_sums = (anchors[wanted] * positives[wanted]).sum(dim=1)
    positive_mean = similarity_sums / _positive_scale(batch)[wanted].to(anchors.dtype)
    losses = log_sum_exp - positive_mean - _anchor_log_counts(batch)[wanted].to(anchors.dtype)
    return torch.where(positives_per_anchor(batch)[wanted] > 0, losses, 0.0)


def _positive_sums(anchors: Tensor, prototypes: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Σ_{p ∈ P(i)} h̃_p [N, D]; classes [N]: the labels as numbers in [0, N)."""
    positives = _class_sums(anchors, classes).sub_(anchors)  # the anchor is not its own positive
    if len(prototypes):
        positives += prototypes[labels]
    return positives


def _subtract_positives(
    for_anchors: Tensor | None,
    for_prototypes: Tensor | None,
    anchors: Tensor,
    positives: Tensor,
    shares: Tensor,
    labels: Tensor,
    classes: Tensor,
    rows: int,
) -> None:
    """Take the gradient of Σ_i shares_i Σ_{p ∈ P(i)} h̃_i · h̃_p off that of the first `rows` anchors, and its terms
    i < rows off that of the prototypes; shares [N, 1]. Overwrites positives."""
    shared, own = shares * anchors, slice(rows)
    if for_anchors is not None:
        for_anchors.sub_(positives[own].mul_(shares[own])).sub_(_class_sums(shared, classes)[own]).add_(shared[own])
    if for_prototypes is not None:
        for_prototypes.index_add_(0, labels[own], shared[own], alpha=-1)


def _class_sums(rows: Tensor, classes: Tensor) -> Tensor:
    """For each row of [N, D] the sum of the rows of its class; classes [N] in [0, N)."""
    return torch.zeros_like(rows).index_add(0, classes, rows)[classes]


def _positive_scale(batch: ContrastiveBatch) -> Tensor:
    """T · |P(i)|, float64 [N]; an anchor without a positive gets T."""
    return batch.temperature * positives_per_anchor(batch).clamp(min=1).double()


def _anchor_log_counts(batch: ContrastiveBatch) -> Tensor:
    """log n[y_i], float64 [N]; 0 without rebalancing."""
    if batch.class_counts is None:
        return torch.zeros(len(batch.labels), dtype=torch.float64, device=batch.labels.device)
    return batch.class_counts.double().log()[batch.labels]


class _Tiling(NamedTuple):
    """The constants of the log-sum-exp: keys, labels, the logarithmic weights b_ik, and rows to a chunk."""

    keys: AccumulatedKeys | RawKeys
    anchors_wanted: int  # the first of the N; all of them are keys
    labels: Tensor  # [N]
    key_log_weights: Tensor  # [M] b of each key, as an anchor of another class meets it
    own_log_weights: Tensor | None  # [N] what b gains on keys of the own class; None: nothing
    temperature: float
    rows: int

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.anchors_wanted, self.rows):
            yield slice(start, min(start + self.rows, self.anchors_wanted))

    def logits(self, chunk: slice, key_log_weights: Tensor) -> Tensor:
        """s_ik + b_ik of a chunk's anchors with every key [rows, M], −inf where the key is the anchor itself."""
        N = len(self.labels)
        logits = self.keys.logits(chunk, key_log_weights)
        if self.own_log_weights is not None:
            own = self.own_log_weights[chunk, None]
            logits[:, :N] += (self.labels[chunk, None] == self.labels) * own
            if logits.shape[1] > N:
                logits[:, N:].scatter_add_(1, self.labels[chunk, None], own)
        logits[:, chunk].diagonal().fill_(-torch.inf)
        return logits


def _tiling(
    batch: ContrastiveBatch,
    anchors: Tensor,
    prototypes: Tensor,
    chunk_bytes: int | None = None,
    anchors_wanted: int | None = None,
) -> _Tiling:
    by_class = class_log_weights(batch)
    N, M = len(anchors), len(anchors) + len(prototypes)
    bytes_a_row = anchors.element_size() * (M + N) + N  # the logits, the own-class term and its mask
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(anchors.device.type, CHUNK_BYTES["cuda"])
    return _Tiling(
        keys=keys_of(batch, anchors, prototypes),
        anchors_wanted=N if anchors_wanted is None else anchors_wanted,
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


class _WeightedLoss(torch.autograd.Function):
    """Σ_i w_i (lse_i − mean of s_ip over the positives), and its gradient in the same pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, prototypes: Tensor, weights: Tensor, positive_scale: Tensor, tiling: _Tiling
    ) -> Tensor:
        N, labels = len(anchors), tiling.labels
        for_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        for_prototypes = torch.zeros_like(prototypes) if ctx.needs_input_grad[1] else None

        total = weights.new_zeros(())
        for chunk in tiling.chunks():
            logits = tiling.logits(chunk, tiling.key_log_weights)
            exponentials, pivots, sums = _exponentials(logits)
            # Without a key the sum is 0 and so is the weight: the clamp turns 0 · log 0 into 0.
            sums = sums.clamp(min=torch.finfo(sums.dtype).tiny)
            weight = weights[chunk, None]
            # Not in place: PyTorch 2.11 compiles a zero gradient for a result that its forward pass changed in place.
            total = total + (weight * (sums.log() + pivots)).sum()
            gradients = exponentials.mul_(weight.to(sums.dtype) / (sums * tiling.temperature))  # w_i p_ik / T
            to_anchors, to_prototypes = gradients[:, :N], gradients[:, N:]
            if for_anchors is not None:
                for_anchors[chunk].addmm_(to_anchors, anchors).addmm_(to_prototypes, prototypes)
                for_anchors.addmm_(to_anchors.T, anchors[chunk])
            if for_prototypes is not None:
                for_prototypes.addmm_(to_prototypes.T, anchors[chunk])

        classes = ranks(labels)
        positives = _positive_sums(anchors, prototypes, labels, classes)
        shares = weights / positive_scale  # of each positive's similarity in the total
        total = total - (shares * row_products(anchors, positives).squeeze(1)).sum()
        shares = shares.to(anchors.dtype)[:, None]
        _subtract_positives(for_anchors, for_prototypes, anchors, positives, shares, labels, classes, N)
        ctx.save_for_backward(for_anchors, for_prototypes)
        return total

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (g if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None)


class _LogSumExp(torch.autograd.Function):
    """lse_i of each anchor. Its gradient recomputes each chunk once and needs no transpose: rows own their sums."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, prototypes: Tensor, tiling: _Tiling) -> Tensor:
        log_sum_exp = _log_sum_exp(tiling)
        ctx.save_for_backward(log_sum_exp)
        ctx.tiling = tiling
        return log_sum_exp

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (log_sum_exp,) = ctx.saved_tensors
        return *_log_sum_exp_gradients(log_sum_exp, upstream, ctx.tiling), None


def _log_sum_exp(tiling: _Tiling) -> Tensor:
    """lse_i of the anchors that are wanted."""
    chunks = [tiling.key_log_weights.new_empty(0)]  # there may be no anchor
    for chunk in tiling.chunks():
        logits = tiling.logits(chunk, tiling.key_log_weights)
        _, pivots, sums = _exponentials(logits)
        chunks.append((sums.log() + pivots).squeeze(1))
    return torch.cat(chunks)  # not written in place: see _WeightedLoss.forward


def _log_sum_exp_gradients(log_sum_exp: Tensor, upstream: Tensor, tiling: _Tiling) -> tuple[Tensor, Tensor]:
    """The gradient of Σ_k g_k lse_k by h̃ of the anchors that are wanted, and of their own terms by the prototypes'.

    log_sum_exp and upstream g are of all anchors, [N] each.
    """
    keys, N = tiling.keys, len(tiling.labels)
    # An anchor without a key has an lse of −inf and logits of −inf: any finite pivot gives exp(−inf) = 0.
    log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0)
    no_weights = torch.zeros_like(tiling.key_log_weights)
    for_anchors = no_weights.new_empty(tiling.anchors_wanted, keys.anchors.shape[1])
    for_prototypes = no_weights.new_zeros(keys.prototypes.shape)
    for chunk in tiling.chunks():
        # s and the own-class gain are symmetric: with b of the other side they give G_ak and G_ka.
        symmetric = tiling.logits(chunk, no_weights)
        columns = symmetric[:, :N] + tiling.key_log_weights[chunk, None]
        columns = columns.sub_(log_sum_exp).exp_().mul_(upstream)  # G_ka
        rows = symmetric.add_(tiling.key_log_weights)
        rows = rows.sub_(log_sum_exp[chunk, None]).exp_().mul_(upstream[chunk, None])  # G_ak
        for_prototypes.add_(keys.weighted_chunk(chunk, rows[:, N:]), alpha=1 / tiling.temperature)
        rows[:, :N] += columns
        for_anchors[chunk] = keys.weighted(rows) / tiling.temperature
    return for_anchors, for_prototypes
