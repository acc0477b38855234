"""The losses of logits: plain, logit-adjusted, balanced softmax, class-balanced focal, LDAM.

All five take logits [N, C], float16, bfloat16, float32 or float64, and labels [N] of any integer dtype. A label is in
[0, C), or −100: such a sample counts in neither sum nor mean, as with PyTorch's `ignore_index`. All return a scalar:
the mean over the other samples, 0 where there are none; float64 for float64 logits, float32 otherwise. They raise
TypeError and ValueError for a wrong type, dtype, shape, device or value; values on a GPU are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcl_fast import checks, logit_checks
from rcl_fast.exact_buffers import ExactBuffers
from rcl_fast.weights import effective_number_weights, log_prior


class CrossEntropy(nn.Module):
    """Plain cross-entropy of logits [N, C] and labels: integers [N], or floating [N, C], each row's probabilities."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logit_checks.check_logits(logits)
        logit_checks.check_class_or_soft_labels(labels, logits)
        return _mean_cross_entropy(_widened(logits), labels)


class LogitAdjusted(ExactBuffers):
    """Cross-entropy of logits + tau · log π_j (Menon et al., ICLR 2021, eq. 10).

    Args:
        class_counts: [C] training images a class, all above 0.
        tau: strength of the adjustment, not below 0; 0 is plain cross-entropy, 1 is consistent for balanced accuracy.

    Raises:
        TypeError, ValueError: class_counts or tau are no such numbers; the message names them.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], tau: float = 1.0) -> None:
        super().__init__()
        checks.check_not_negative("tau", tau)
        self.register_buffer("log_prior", log_prior(_counts(class_counts), torch.float64), persistent=False)
        self.tau = tau

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C]; labels integers [N], or floating [N, C], each row's probabilities -> the mean."""
        logit_checks.check_logits(logits, self.log_prior)
        logit_checks.check_class_or_soft_labels(labels, logits)
        logits = _widened(logits)
        return _mean_cross_entropy(logits + self.tau * self.log_prior.to(logits.dtype), labels)


class BalancedSoftmax(LogitAdjusted):
    """Cross-entropy with softmax over n_j · exp(logit_j) (Ren et al., NeurIPS 2020, eq. 3): LogitAdjusted at tau 1."""

    def __init__(self, class_counts: Tensor | Sequence[int]) -> None:
        super().__init__(class_counts, tau=1.0)


class CBFocal(ExactBuffers):
    """Class-balanced focal loss (Cui et al., CVPR 2019, eq. 7), on one sigmoid a class.

    Args:
        class_counts: [C] training images a class, 1 or more.
        beta: of the effective number of samples, in [0, 1).
        gamma: focusing exponent, not below 0; 0 for plain sigmoid cross-entropy.

    Raises:
        TypeError, ValueError: class_counts, beta or gamma are no such numbers; the message names them.
    """

    class_weights: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], beta: float = 0.9999, gamma: float = 1.0) -> None:
        super().__init__()
        checks.check_not_negative("gamma", gamma)
        weights = effective_number_weights(_counts(class_counts), beta, torch.float64)
        self.register_buffer("class_weights", weights, persistent=False)
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels integers [N] -> the sum over classes, averaged over the batch."""
        logit_checks.check_logits(logits, self.class_weights)
        logit_checks.check_class_labels(labels, logits)
        logits, labels = _widened(logits), labels.long()
        signed = torch.where(_is_label(labels, logits), logits, -logits)  # log p_t = log sigmoid(signed)
        focal = -(F.logsigmoid(-signed) * self.gamma).exp() * F.logsigmoid(signed)
        overflow = logits.detach().amax(dim=1) * 0  # NaN where a logit has become infinite, which looks certain
        losses = self.class_weights.to(logits.dtype).gather(0, _indices(labels)) * (focal.sum(dim=1) + overflow)
        return losses.masked_fill(labels == logit_checks.IGNORED, 0).sum() / _samples(labels)


class LDAM(ExactBuffers):
    """Label-distribution-aware margins, for a cosine classifier (Cao et al., NeurIPS 2019, eq. 13).

    `reweight` starts the deferred re-weighting (DRW): call it once, at the epoch where the classes are to be
    weighted by their effective number. A state dict holds these weights.

    Args:
        class_counts: [C] training images a class, all above 0; 1 or more for `reweight`.
        max_margin: the margin of the rarest class, not below 0; class j has max_margin · (min n / n_j)^(1/4).
        scale: the cosine classifier's scale, above 0: margins are in units of cosine, logits are cosine · scale.
        beta: of the effective number of samples in `reweight`, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is no such number; the message names it.
    """

    class_counts: Tensor
    margins: Tensor
    class_weights: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.9999,
    ) -> None:
        super().__init__()
        checks.check_not_negative("max_margin", max_margin)
        checks.check_number("scale", scale, lambda number: 0 < number < math.inf, "be finite and above 0")
        checks.check_beta(beta)
        counts = _counts(class_counts)
        roots = counts.double() ** 0.25  # before the quotient, which could underflow
        self.register_buffer("class_counts", counts.clone(), persistent=False)
        self.register_buffer("margins", scale * max_margin * (roots.min() / roots), persistent=False)
        self.register_buffer("class_weights", torch.ones_like(roots))
        self.beta = beta

    def reweight(self) -> None:
        """Weights each class by its effective number from here on (DRW).

        Raises:
            ValueError: class_counts on the CPU have a class with fewer than 1.
        """
        self.class_weights.copy_(effective_number_weights(self.class_counts, self.beta, torch.float64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C] of a cosine classifier with the same scale, labels integers [N] -> the weighted mean."""
        logit_checks.check_logits(logits, self.margins)
        logit_checks.check_class_labels(labels, logits)
        logits, labels = _widened(logits), labels.long()
        weights = self.class_weights.to(logits.dtype)
        lowered = logits - _is_label(labels, logits) * self.margins.to(logits.dtype)
        total = F.cross_entropy(lowered, labels, weight=weights, ignore_index=logit_checks.IGNORED, reduction="sum")
        weight = weights.gather(0, _indices(labels)).masked_fill(labels == logit_checks.IGNORED, 0).sum()
        return total / weight.masked_fill(weight == 0, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Loads the weights, unless they are none: what is wrong with them goes to the errors."""
        key = f"{prefix}class_weights"
        *_, errors = arguments
        try:
            if key in state_dict:
                checks.check_class_weights(checks.as_class_vector("class_weights", state_dict[key]))
        except (TypeError, ValueError) as error:
            errors.append(f"{key}: {error}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *arguments)


def _counts(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Returns class counts [C] as a tensor; they are read once, on a GPU too."""
    counts = checks.as_class_vector("class_counts", class_counts)
    checks.check_class_counts(counts, rebalance=True, validate=True)
    return counts


def _widened(logits: Tensor) -> Tensor:
    """Returns logits in the dtype of the computation: float64 as they are, others in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over the samples that count; PyTorch's own mean of none is NaN."""
    if labels.dtype.is_floating_point:
        return F.cross_entropy(logits, labels.to(logits.dtype), reduction="sum") / max(len(labels), 1)
    labels = labels.long()
    return F.cross_entropy(logits, labels, ignore_index=logit_checks.IGNORED, reduction="sum") / _samples(labels)


def _samples(labels: Tensor) -> Tensor:
    """Returns how many samples count, but 1 where none does, as a divisor."""
    return (labels != logit_checks.IGNORED).sum().clamp(min=1)


def _indices(labels: Tensor) -> Tensor:
    """Returns labels [N] with 0 for −100, to look up rows that are then left out."""
    return labels.masked_fill(labels == logit_checks.IGNORED, 0)


def _is_label(labels: Tensor, logits: Tensor) -> Tensor:
    """Returns bool [N, C]: true at each sample's label, nowhere in a row of −100."""
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
