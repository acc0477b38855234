"""Computes the loss in chunks of rows: O(M·D) memory and one chunk, on CPU and CUDA; the fastest way on a CPU.

Only the log-sum-exp needs the N×M similarities; the mean over the positives comes from one sum of features a class.
The mathematics is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcl_fast.autograd import first_derivative_only
from rcl_fast.backends.protocol import RowLosses
from rcl_fast.backends.tiled_keys import AccumulatedKeys, RawKeys, blocks, keys_of, multiplies_16_bits
from rcl_fast.backends.tiled_rows import class_sums, row_products, sums_of_others, unit_rows
from rcl_fast.batch import ContrastiveBatch, compressed_rows, labels_of_keys
from rcl_fast.class_statistics import ClassStatistics, class_statistics, log_counts, reduction_weights

# Bytes of one chunk of rows with its temporaries: a CPU wants it in cache, a GPU wants few launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
SMALLEST_TEMPERATURE = 1 / 64  # of unit rows whose logits are small
Rows = tuple[Tensor, Tensor, Tensor]  # h̃ of anchors [N, D], keys [Q, D] and prototypes [C, D]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # by these


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
    rows = compressed_rows(batch, unit_rows)
    loss = _WeightedLoss.apply(*rows, weights, _tiling(batch, statistics, rows))
    return (loss - (weights * _anchor_log_counts(batch)).sum()).to(rows[0].dtype)


def forward_rows(batch: ContrastiveBatch, rows: int) -> RowLosses:
    """Returns ℓ_i of the first `rows` anchors, the maxima and sums of their softmax [rows, 2], and what else
    `backward_rows` reads."""
    statistics = class_statistics(batch)
    compressed = compressed_rows(batch, unit_rows)
    tiling = _tiling(batch, statistics, compressed, anchors_wanted=rows)
    softmax = _softmax_sums(tiling)
    each = _losses_from(batch, tiling, compressed, _lse(softmax))
    return RowLosses(each, softmax, statistics.positives, (*compressed, *statistics))


def backward_rows(
    batch: ContrastiveBatch, rows: int, saved: tuple[Any, ...], softmax: Tensor, grad_losses: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes and
    by the keys; None for keys that do not require grad.

    softmax [N, 2] and grad_losses g [N] are of all anchors.
    """
    compressed, statistics = saved[:3], ClassStatistics(*saved[3:])
    grad_losses = torch.where(statistics.positives > 0, grad_losses, 0.0)
    tiling = _tiling(batch, statistics, compressed, anchors_wanted=rows)
    wanted = (True, batch.keys is not None and batch.keys.requires_grad, batch.prototypes is not None)
    gradients = _log_sum_exp_gradients(softmax, grad_losses, tiling, wanted)
    shares = grad_losses / tiling.positive_scale()
    _subtract_positives(gradients, compressed[0], _positive_sums(compressed, tiling), shares, tiling)
    with torch.enable_grad():
        features, keys, prototypes = (
            rows.detach().requires_grad_() if wants and rows is not None else None
            for rows, wants in zip((batch.features[:rows], batch.keys, batch.prototypes), wanted, strict=True)
        )
        assert features is not None
        local = batch._replace(labels=batch.labels[:rows], features=features, keys=keys, prototypes=prototypes)
        outputs = compressed_rows(local, unit_rows)
    for_features, for_keys, for_prototypes = (
        None if leaf is None else torch.autograd.grad(output, leaf, gradient)[0]
        for output, leaf, gradient in zip(outputs, (features, keys, prototypes), gradients, strict=True)
    )
    assert for_features is not None
    return for_features, for_prototypes, for_keys


def _losses(batch: ContrastiveBatch, statistics: ClassStatistics) -> Tensor:
    """Returns ℓ_i [N], differentiable."""
    rows = compressed_rows(batch, unit_rows)
    tiling = _tiling(batch, statistics, rows)
    return _losses_from(batch, tiling, rows, _LogSumExp.apply(*rows, tiling))


def _losses_from(batch: ContrastiveBatch, tiling: _Tiling, rows: Rows, lse: Tensor) -> Tensor:
    """Returns ℓ_i of the first anchors, as many as there are lse_i."""
    anchors, wanted = rows[0], slice(len(lse))
    positives = _positive_sums(rows, tiling)
    # Not a matrix product: autograd would run its backward in 16 bits where users call that inside autocast.
    similarity_sums = (anchors[wanted] * positives[wanted]).sum(dim=1)
    positive_mean = (similarity_sums / tiling.positive_scale()[wanted].to(similarity_sums.dtype)).to(anchors.dtype)
    each = lse - positive_mean - _anchor_log_counts(batch)[wanted].to(anchors.dtype)
    return torch.where(tiling.statistics.positives[wanted] > 0, each, 0.0)


def _positive_sums(rows: Rows, tiling: _Tiling) -> Tensor:
    """Returns Σ_{p ∈ P(i)} h̃_p [N, D]: of unit rows in their dtype, of others in float64.

    There a product of a row and a sum may leave the range that the temperature brings it back into.
    """
    anchors, keys, prototypes = rows
    classes, key_classes = tiling.statistics.classes, tiling.statistics.key_classes
    if not tiling.normalized:
        anchors, keys = anchors.double(), keys.double()
    if not tiling.anchors_are_keys:
        positives = torch.zeros_like(anchors)
    elif tiling.normalized:
        # The anchor is not a positive of itself.
        positives = class_sums(anchors, classes, tiling.class_count)[classes].sub_(anchors)
    else:
        positives = sums_of_others(anchors, classes)
    if len(keys):
        positives = positives + class_sums(keys, key_classes, tiling.class_count)[classes]
    return positives + prototypes[tiling.labels] if len(prototypes) else positives


def _subtract_positives(
    gradients: Gradients, anchors: Tensor, positives: Tensor, shares: Tensor, tiling: _Tiling
) -> None:
    """Takes the gradient of Σ_i shares_i Σ_{p ∈ P(i)} h̃_i · h̃_p off that of the wanted anchors, and the terms of these
    off those of keys and prototypes; shares [N]. Overwrites positives, whose dtype it computes in."""
    for_anchors, for_keys, for_prototypes = gradients
    classes, first = tiling.statistics.classes, slice(tiling.anchors_wanted)
    shares = shares.to(positives.dtype)[:, None]
    shared = shares * anchors.to(positives.dtype)
    if for_anchors is not None:
        as_anchors = positives[first].mul_(shares[first])
        if not tiling.anchors_are_keys:
            for_anchors.sub_(as_anchors)
        elif tiling.normalized:
            as_positives = class_sums(shared, classes, tiling.class_count)[classes[first]]
            for_anchors.sub_(as_anchors).sub_(as_positives).add_(shared[first])
        else:
            for_anchors.sub_(as_anchors.add_(sums_of_others(shared, classes)[first]))
    if for_keys is not None:
        sums = class_sums(shared[first], classes[first], tiling.class_count)
        for_keys.sub_(sums[tiling.statistics.key_classes])
    if for_prototypes is not None:
        for_prototypes.index_add_(0, tiling.labels[first], shared[first].to(for_prototypes.dtype), alpha=-1)


def _anchor_log_counts(batch: ContrastiveBatch) -> Tensor:
    """Returns log n[y_i], float64 [N]; 0 without rebalancing."""
    if batch.class_counts is None:
        return torch.zeros(len(batch.labels), dtype=torch.float64, device=batch.labels.device)
    return log_counts(batch.class_counts, torch.float64)[batch.labels]


class _Tiling(NamedTuple):
    """The constants of all chunks: keys, labels, the logarithmic weights b_ik, and how many chunks there are."""

    keys: AccumulatedKeys | RawKeys
    anchors_wanted: int  # the first of the N
    anchors_are_keys: bool  # all N of them
    labels: Tensor  # [N]
    key_labels: Tensor  # [N + Q] of all keys but the prototypes, [Q] where the anchors are no keys
    key_log_weights: Tensor  # [M] b of each key, as an anchor of another class meets it
    statistics: ClassStatistics
    class_count: int  # N + Q: more than any of the statistics' classes
    temperature: float
    normalized: bool
    small_logits: bool  # |s| is known to be small: rounding does not matter to exp(s)
    chunk_count: int

    def positive_scale(self) -> Tensor:
        """Returns T · |P(i)|, float64 [N]; T for an anchor without a positive."""
        return self.temperature * self.statistics.positives.clamp(min=1).double()

    def chunks(self) -> Iterator[slice]:
        """Yields chunks as equal as can be: torch.compile makes a graph for a number of chunks, not for their sizes."""
        for i in range(self.chunk_count):
            yield slice(self.anchors_wanted * i // self.chunk_count, self.anchors_wanted * (i + 1) // self.chunk_count)

    def logits(self, chunk: slice, key_log_weights: Tensor) -> Tensor:
        """Returns s_ik + b_ik of a chunk's anchors with every key [rows, M], −inf where the key is the anchor."""
        R = len(self.key_labels)
        logits = self.keys.logits(chunk, key_log_weights)
        if self.statistics.same_class_terms is not None:
            terms = self.statistics.same_class_terms[chunk, None]
            logits[:, :R] += (self.labels[chunk, None] == self.key_labels) * terms
            if logits.shape[1] > R:
                logits[:, R:].scatter_add_(1, self.labels[chunk, None], terms)
        if self.anchors_are_keys:
            logits[:, chunk].diagonal().fill_(-torch.inf)
        return logits

    def settled(self, differences: Tensor, maxima: Tensor) -> Tensor:
        """Returns logits minus their maxima, 0 where no more than rounding is between them; changes them in place.

        A logit is made twice, in its anchor's row and in its key's. Where logits are large, exp of what rounding leaves
        between the two would make any number of a probability of 1.
        """
        if self.small_logits:
            return differences
        D = self.keys.anchors.shape[1]
        # Both sums of D terms are off by some √D units, rarely by more than four times that.
        tolerances = 4 * (D**0.5 + 2) * torch.finfo(maxima.dtype).eps * maxima.abs()
        return differences.masked_fill_(differences > -tolerances, 0.0)


def _tiling(
    batch: ContrastiveBatch, statistics: ClassStatistics, rows: Rows, anchors_wanted: int | None = None
) -> _Tiling:
    anchors, keys, prototypes = rows
    key_labels = labels_of_keys(batch)
    N, R, M = len(anchors), len(key_labels), len(key_labels) + len(prototypes)
    bytes_a_row = max(1, anchors.element_size() * (M + R) + R)  # the logits, the same-class term and its mask
    wanted = N if anchors_wanted is None else anchors_wanted
    chunk_bytes = CHUNK_BYTES.get(anchors.device.type, CHUNK_BYTES["cuda"])
    by_class = statistics.log_weights
    return _Tiling(
        keys=keys_of(batch, anchors, keys, prototypes),
        anchors_wanted=wanted,
        anchors_are_keys=batch.anchors_are_keys,
        labels=batch.labels,
        key_labels=key_labels,
        key_log_weights=torch.cat([by_class[key_labels], by_class[: len(prototypes)]]),
        statistics=statistics,
        class_count=N + len(keys),
        temperature=batch.temperature,
        normalized=batch.normalize,
        # Compiled code asks nothing of the temperature: that would be one more graph.
        small_logits=not torch.compiler.is_compiling() and _has_small_logits(batch),
        chunk_count=int(min(wanted, -(-wanted * bytes_a_row // chunk_bytes))),
    )


def _has_small_logits(batch: ContrastiveBatch) -> bool:
    return batch.normalize and batch.compression is None and batch.temperature >= SMALLEST_TEMPERATURE


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns exp(logits − maximum), made in place, the rows' maxima (finite also without a key) and sums [rows, 1]."""
    least = torch.finfo(logits.dtype).min
    if logits.shape[1] == 0:  # nothing has no maximum
        return logits, logits.new_full((len(logits), 1), least), logits.new_zeros(len(logits), 1)
    maxima = logits.amax(dim=1, keepdim=True).clamp(min=least)
    exponentials = logits.sub_(maxima).exp_()
    return exponentials, maxima, exponentials.sum(dim=1, keepdim=True)


class _WeightedLoss(torch.autograd.Function):
    """Computes Σ_i w_i (lse_i − mean of s_ip over the positives), and its gradient in the same pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, keys: Tensor, prototypes: Tensor, weights: Tensor, tiling: _Tiling
    ) -> Tensor:
        for_anchors, for_keys, for_prototypes = gradients = (
            torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None,
            torch.zeros_like(keys) if ctx.needs_input_grad[1] else None,
            torch.zeros_like(prototypes) if ctx.needs_input_grad[2] else None,
        )
        of_keys = (for_anchors if tiling.anchors_are_keys else None, for_keys, for_prototypes)

        total = weights.new_zeros(())
        for chunk in tiling.chunks():
            logits = tiling.logits(chunk, tiling.key_log_weights)
            exponentials, maxima, sums = _exponentials(logits)
            sums = sums.clamp(min=1)  # without a key the sum is 0 and so is the weight: no 0 · log 0
            weight = weights[chunk, None]
            # Not in place: PyTorch 2.11 compiles a zero gradient for a result that its forward pass changed in place.
            total = total + (weight * (sums.log() + maxima)).sum()
            dlogits = exponentials.mul_(weight.to(sums.dtype) / (sums * tiling.temperature))  # w_i p_ik / T
            parts = blocks(dlogits, tiling.keys.parts)
            if for_anchors is not None:
                for block, part in parts:
                    for_anchors[chunk].addmm_(block, part)
            for (block, _), for_part in zip(parts, of_keys, strict=True):
                if for_part is not None:
                    for_part.addmm_(block.T, anchors[chunk])

        positives = _positive_sums((anchors, keys, prototypes), tiling)
        shares = weights / tiling.positive_scale()  # of each positive's similarity in the total
        total = total - (shares * row_products(anchors.to(positives.dtype), positives).squeeze(1)).sum()
        _subtract_positives(gradients, anchors, positives, shares, tiling)
        ctx.save_for_backward(*gradients, total)
        return total

    @staticmethod
    @first_derivative_only("backend='tiled'")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, _ = ctx.saved_tensors
        return *(g if g is None else g * grad_output.to(g.dtype) for g in gradients), None, None


class _LogSumExp(torch.autograd.Function):
    """Computes lse_i of each anchor. The gradient recomputes each chunk once; a row has its whole sum: no transpose."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, keys: Tensor, prototypes: Tensor, tiling: _Tiling) -> Tensor:
        softmax = _softmax_sums(tiling)
        lse = _lse(softmax)
        # Those from the third on are in the tiling too: saved, they are known to be unchanged in the backward pass.
        ctx.save_for_backward(softmax, lse, anchors, keys, prototypes, tiling.labels)
        ctx.tiling = tiling
        return lse

    @staticmethod
    @first_derivative_only("backend='tiled'")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        softmax, *_ = ctx.saved_tensors
        return *_log_sum_exp_gradients(softmax, grad_output, ctx.tiling, ctx.needs_input_grad[:3]), None


def _softmax_sums(tiling: _Tiling) -> Tensor:
    """Returns for each wanted anchor the maximum of its logits and the sum of exp(logit − maximum): [rows, 2]."""
    none = tiling.key_log_weights.new_empty(0, 2)  # there may be no anchor
    chunks = [none]
    for chunk in tiling.chunks():
        _, maxima, sums = _exponentials(tiling.logits(chunk, tiling.key_log_weights))
        chunks.append(torch.cat([maxima, sums], dim=1))
    return torch.cat(chunks)  # not written in place: see _WeightedLoss.forward


def _lse(softmax: Tensor) -> Tensor:
    """Returns the log-sum-exp [rows] of maxima and sums [rows, 2]."""
    maxima, sums = softmax.unbind(1)
    return sums.log() + maxima


def _log_sum_exp_gradients(softmax: Tensor, grad_lse: Tensor, tiling: _Tiling, wanted: tuple[bool, ...]) -> Gradients:
    """Returns the gradient of Σ_k g_k lse_k by h̃ of the wanted anchors, and of their terms by h̃ of keys and prototypes.

    softmax [N, 2] and grad_lse g [N] are of all anchors. The first gradient is always made, as others are by-products.
    """
    maxima, sums = softmax.unbind(1)
    keys, N = tiling.keys, len(tiling.labels)
    shares = grad_lse / sums.clamp(min=1)  # without a key both are 0
    no_log_weights = torch.zeros_like(tiling.key_log_weights)
    for_anchors = no_log_weights.new_empty(tiling.anchors_wanted, keys.anchors.shape[1])
    for_keys, for_prototypes = (
        no_log_weights.new_zeros(part.shape) if wants else None
        for part, wants in zip(keys.parts[1:], wanted[1:], strict=True)
    )
    for chunk in tiling.chunks():
        # s and the same-class term are symmetric: with b of the other side they give G_ak and G_ka.
        symmetric = tiling.logits(chunk, no_log_weights)
        columns = None
        if tiling.anchors_are_keys:
            columns = symmetric[:, :N] + tiling.key_log_weights[chunk, None]
            columns = tiling.settled(columns.sub_(maxima), maxima).exp_().mul_(shares)  # G_ka
        rows = symmetric.add_(tiling.key_log_weights)
        rows = tiling.settled(rows.sub_(maxima[chunk, None]), maxima[chunk, None])
        rows = rows.exp_().mul_(shares[chunk, None])  # G_ak
        _, *others = blocks(rows, keys.parts)
        for (block, _), for_part in zip(others, (for_keys, for_prototypes), strict=True):
            if for_part is not None:
                for_part.add_(keys.weighted_chunk(chunk, block).div_(tiling.temperature))
        if columns is not None:
            rows[:, :N] += columns
        for_anchors[chunk] = keys.weighted(rows) / tiling.temperature
    return for_anchors, for_keys, for_prototypes
