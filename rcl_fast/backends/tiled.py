"""Computes the loss in chunks of rows: O((N + C)·D) memory and one chunk, on CPU and CUDA; the fastest way on a CPU.

Only the log-sum-exp needs the N×M similarities; the mean over the positives comes from one sum of features a class.
The mathematics is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcl_fast.backends.tiled_keys import AccumulatedKeys, RawKeys, keys_of, multiplies_16_bits
from rcl_fast.batch import ContrastiveBatch, anchors_and_prototypes, row_products, without_autocast
from rcl_fast.class_statistics import ClassStatistics, class_statistics, reduction_weights

# Bytes of one chunk of rows with its temporaries: a CPU wants it in cache, a GPU wants few launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def losses(batch: ContrastiveBatch) -> Tensor:
    """Returns ℓ_i for each anchor [N]; 0 for an anchor without a positive."""
    return _losses(batch, class_statistics(batch))


def total(batch: ContrastiveBatch, reduction: str) -> Tensor:
    """Returns the "sum" of ℓ_i, or their "mean" over the anchors that have a positive, a scalar.

    What each ℓ_i counts for is known here, so the gradient is computed while a chunk's exponentials are at hand, and
    nothing is computed twice. Not in 16 bits, where the columns' part would need dL/dlogits rounded once more.
    """
    statistics = class_statistics(batch)
    weights = reduction_weights(statistics.positives, reduction)  # float64: sums of N terms that nearly cancel
    if not torch.is_grad_enabled() or multiplies_16_bits(batch):
        each = _losses(batch, statistics)
        return (weights * each).sum().to(each.dtype)
    anchors, prototypes = anchors_and_prototypes(batch)
    tiling = _tiling(batch, statistics, anchors, prototypes)
    loss = _WeightedLoss.apply(anchors, prototypes, weights, tiling)
    return (loss - (weights * _anchor_log_counts(batch)).sum()).to(anchors.dtype)


def forward_rows(batch: ContrastiveBatch, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Returns ℓ_i and lse_i of the first `rows` anchors [rows], and what `backward_rows` reads; all anchors are keys.

    lse_i is +inf for an anchor without a positive.
    """
    statistics = class_statistics(batch)
    anchors, prototypes = anchors_and_prototypes(batch)
    tiling = _tiling(batch, statistics, anchors, prototypes, anchors_wanted=rows)
    lse = _log_sum_exp(tiling)
    each = _losses_from(batch, tiling, anchors, prototypes, lse)
    return each, lse.masked_fill(statistics.positives[:rows] == 0, torch.inf), (anchors, prototypes, *statistics)


def backward_rows(
    batch: ContrastiveBatch, rows: int, saved: tuple[Any, ...], lse: Tensor, grad_losses: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes.

    lse and grad_losses g are of all anchors, [N] each.
    """
    anchors, prototypes, *rest = saved
    statistics = ClassStatistics(*rest)
    grad_losses = torch.where(statistics.positives > 0, grad_losses, 0.0)
    tiling = _tiling(batch, statistics, anchors, prototypes, anchors_wanted=rows)
    for_anchors, for_prototypes = _log_sum_exp_gradients(lse, grad_losses, tiling)
    positives = _positive_sums(anchors, prototypes, tiling)
    shares = (grad_losses / tiling.positive_scale()).to(anchors.dtype)[:, None]
    _subtract_positives(for_anchors, for_prototypes, anchors, positives, shares, tiling)
    with torch.enable_grad():
        raw = [batch.features[:rows].detach().requires_grad_()]
        if batch.prototypes is not None:
            raw.append(batch.prototypes.detach().requires_grad_())
        local = batch._replace(labels=batch.labels[:rows], features=raw[0], prototypes=raw[1] if raw[1:] else None)
        compressed = anchors_and_prototypes(local)
    gradients = zip(compressed, raw, (for_anchors, for_prototypes), strict=False)
    for_raw = [torch.autograd.grad(output, leaf, gradient)[0] for output, leaf, gradient in gradients]
    return for_raw[0], for_raw[1] if for_raw[1:] else None


def _losses(batch: ContrastiveBatch, statistics: ClassStatistics) -> Tensor:
    """Returns ℓ_i [N], differentiable."""
    anchors, prototypes = anchors_and_prototypes(batch)
    tiling = _tiling(batch, statistics, anchors, prototypes)
    lse = _LogSumExp.apply(anchors, prototypes, tiling)
    return _losses_from(batch, tiling, anchors, prototypes, lse)


def _losses_from(batch: ContrastiveBatch, tiling: _Tiling, anchors: Tensor, prototypes: Tensor, lse: Tensor) -> Tensor:
    """Returns ℓ_i of the first anchors, as many as there are lse_i."""
    wanted = slice(len(lse))
    positives = _positive_sums(anchors, prototypes, tiling)
    # Not a matrix product: autograd would run its backward in 16 bits where users call that inside autocast.
    similarity_sums = (anchors[wanted] * positives[wanted]).sum(dim=1)
    positive_mean = similarity_sums / tiling.positive_scale()[wanted].to(anchors.dtype)
    each = lse - positive_mean - _anchor_log_counts(batch)[wanted].to(anchors.dtype)
    return torch.where(tiling.statistics.positives[wanted] > 0, each, 0.0)


def _positive_sums(anchors: Tensor, prototypes: Tensor, tiling: _Tiling) -> Tensor:
    """Returns Σ_{p ∈ P(i)} h̃_p [N, D]."""
    positives = _class_sums(anchors, tiling).sub_(anchors)  # the anchor is not a positive of itself
    if len(prototypes):
        positives += prototypes[tiling.labels]
    return positives


def _subtract_positives(
    for_anchors: Tensor | None,
    for_prototypes: Tensor | None,
    anchors: Tensor,
    positives: Tensor,
    shares: Tensor,
    tiling: _Tiling,
) -> None:
    """Takes the gradient of Σ_i shares_i Σ_{p ∈ P(i)} h̃_i · h̃_p off that of the wanted anchors, and the terms of these
    off that of the prototypes; shares [N, 1]. Overwrites positives."""
    shared, first = shares * anchors, slice(tiling.anchors_wanted)
    if for_anchors is not None:
        as_anchors = positives[first].mul_(shares[first])
        for_anchors.sub_(as_anchors).sub_(_class_sums(shared, tiling)[first]).add_(shared[first])
    if for_prototypes is not None:
        for_prototypes.index_add_(0, tiling.labels[first], shared[first], alpha=-1)


def _class_sums(rows: Tensor, tiling: _Tiling) -> Tensor:
    """Returns for each row of [N, D] the sum of the rows of its class."""
    classes = tiling.statistics.classes
    return torch.zeros_like(rows).index_add(0, classes, rows)[classes]


def _anchor_log_counts(batch: ContrastiveBatch) -> Tensor:
    """Returns log n[y_i], float64 [N]; 0 without rebalancing."""
    if batch.class_counts is None:
        return torch.zeros(len(batch.labels), dtype=torch.float64, device=batch.labels.device)
    return batch.class_counts.double().log()[batch.labels]


class _Tiling(NamedTuple):
    """The constants of all chunks: keys, labels, the logarithmic weights b_ik, and how many rows a chunk has."""

    keys: AccumulatedKeys | RawKeys
    anchors_wanted: int  # the first of the N; all of them are keys
    labels: Tensor  # [N]
    key_log_weights: Tensor  # [M] b of each key, as an anchor of another class meets it
    statistics: ClassStatistics
    temperature: float
    rows: int

    def positive_scale(self) -> Tensor:
        """Returns T · |P(i)|, float64 [N]; T for an anchor without a positive."""
        return self.temperature * self.statistics.positives.clamp(min=1).double()

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.anchors_wanted, self.rows):
            yield slice(start, min(start + self.rows, self.anchors_wanted))

    def logits(self, chunk: slice, key_log_weights: Tensor) -> Tensor:
        """Returns s_ik + b_ik of a chunk's anchors with every key [rows, M], −inf where the key is the anchor."""
        N = len(self.labels)
        logits = self.keys.logits(chunk, key_log_weights)
        if self.statistics.same_class_terms is not None:
            terms = self.statistics.same_class_terms[chunk, None]
            logits[:, :N] += (self.labels[chunk, None] == self.labels) * terms
            if logits.shape[1] > N:
                logits[:, N:].scatter_add_(1, self.labels[chunk, None], terms)
        logits[:, chunk].diagonal().fill_(-torch.inf)
        return logits


def _tiling(
    batch: ContrastiveBatch,
    statistics: ClassStatistics,
    anchors: Tensor,
    prototypes: Tensor,
    anchors_wanted: int | None = None,
) -> _Tiling:
    N, M = len(anchors), len(anchors) + len(prototypes)
    bytes_a_row = anchors.element_size() * (M + N) + N  # the logits, the same-class term and its mask
    chunk_bytes = CHUNK_BYTES.get(anchors.device.type, CHUNK_BYTES["cuda"])
    by_class = statistics.log_weights
    return _Tiling(
        keys=keys_of(batch, anchors, prototypes),
        anchors_wanted=N if anchors_wanted is None else anchors_wanted,
        labels=batch.labels,
        key_log_weights=torch.cat([by_class[batch.labels], by_class[: len(prototypes)]]),
        statistics=statistics,
        temperature=batch.temperature,
        rows=max(1, chunk_bytes // max(1, bytes_a_row)),
    )


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns exp(logits − maximum), made in place, the rows' maxima (finite also without a key) and sums [rows, 1]."""
    maxima = logits.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    exponentials = logits.sub_(maxima).exp_()
    return exponentials, maxima, exponentials.sum(dim=1, keepdim=True)


class _WeightedLoss(torch.autograd.Function):
    """Computes Σ_i w_i (lse_i − mean of s_ip over the positives), and its gradient in the same pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, prototypes: Tensor, weights: Tensor, tiling: _Tiling) -> Tensor:
        N = len(anchors)
        for_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        for_prototypes = torch.zeros_like(prototypes) if ctx.needs_input_grad[1] else None

        total = weights.new_zeros(())
        for chunk in tiling.chunks():
            logits = tiling.logits(chunk, tiling.key_log_weights)
            exponentials, maxima, sums = _exponentials(logits)
            # Without a key the sum is 0 and so is the weight: the clamp turns 0 · log 0 into 0.
            sums = sums.clamp(min=torch.finfo(sums.dtype).tiny)
            weight = weights[chunk, None]
            # Not in place: PyTorch 2.11 compiles a zero gradient for a result that its forward pass changed in place.
            total = total + (weight * (sums.log() + maxima)).sum()
            dlogits = exponentials.mul_(weight.to(sums.dtype) / (sums * tiling.temperature))  # w_i p_ik / T
            to_anchors, to_prototypes = dlogits[:, :N], dlogits[:, N:]
            if for_anchors is not None:
                for_anchors[chunk].addmm_(to_anchors, anchors).addmm_(to_prototypes, prototypes)
                for_anchors.addmm_(to_anchors.T, anchors[chunk])
            if for_prototypes is not None:
                for_prototypes.addmm_(to_prototypes.T, anchors[chunk])

        positives = _positive_sums(anchors, prototypes, tiling)
        shares = weights / tiling.positive_scale()  # of each positive's similarity in the total
        total = total - (shares * row_products(anchors, positives).squeeze(1)).sum()
        shares = shares.to(anchors.dtype)[:, None]
        _subtract_positives(for_anchors, for_prototypes, anchors, positives, shares, tiling)
        ctx.save_for_backward(for_anchors, for_prototypes)
        return total

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (g if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None)


class _LogSumExp(torch.autograd.Function):
    """Computes lse_i of each anchor. The gradient recomputes each chunk once; a row has its whole sum: no transpose."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, prototypes: Tensor, tiling: _Tiling) -> Tensor:
        lse = _log_sum_exp(tiling)
        ctx.save_for_backward(lse)
        ctx.tiling = tiling
        return lse

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (lse,) = ctx.saved_tensors
        return *_log_sum_exp_gradients(lse, grad_output, ctx.tiling), None


def _log_sum_exp(tiling: _Tiling) -> Tensor:
    """Returns lse_i of the anchors that are wanted."""
    chunks = [tiling.key_log_weights.new_empty(0)]  # there may be no anchor
    for chunk in tiling.chunks():
        logits = tiling.logits(chunk, tiling.key_log_weights)
        _, maxima, sums = _exponentials(logits)
        chunks.append((sums.log() + maxima).squeeze(1))
    return torch.cat(chunks)  # not written in place: see _WeightedLoss.forward


def _log_sum_exp_gradients(lse: Tensor, grad_lse: Tensor, tiling: _Tiling) -> tuple[Tensor, Tensor]:
    """Returns the gradient of Σ_k g_k lse_k by h̃ of the wanted anchors, and of their terms by h̃ of the prototypes.

    lse and grad_lse g are of all anchors, [N] each.
    """
    keys, N = tiling.keys, len(tiling.labels)
    # An anchor without a key has an lse of −inf and logits of −inf: any finite maximum gives exp(−inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    no_log_weights = torch.zeros_like(tiling.key_log_weights)
    for_anchors = no_log_weights.new_empty(tiling.anchors_wanted, keys.anchors.shape[1])
    for_prototypes = no_log_weights.new_zeros(keys.prototypes.shape)
    for chunk in tiling.chunks():
        # s and the same-class term are symmetric: with b of the other side they give G_ak and G_ka.
        symmetric = tiling.logits(chunk, no_log_weights)
        columns = symmetric[:, :N] + tiling.key_log_weights[chunk, None]
        columns = columns.sub_(lse).exp_().mul_(grad_lse)  # G_ka
        rows = symmetric.add_(tiling.key_log_weights)
        rows = rows.sub_(lse[chunk, None]).exp_().mul_(grad_lse[chunk, None])  # G_ak
        for_prototypes.add_(keys.weighted_chunk(chunk, rows[:, N:]), alpha=1 / tiling.temperature)
        rows[:, :N] += columns
        for_anchors[chunk] = keys.weighted(rows) / tiling.temperature
    return for_anchors, for_prototypes
