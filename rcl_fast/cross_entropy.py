"""The losses of logits: plain, logit-adjusted, balanced softmax, class-balanced focal, LDAM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcl_fast import checks
from rcl_fast.weights import effective_number_weights, log_prior


class CrossEntropy(nn.Module):
    """Plain cross-entropy of logits [N, C] and labels [N]; returns the mean over the batch, a scalar."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)


class LogitAdjusted(nn.Module):
    """Cross-entropy of logits + tau · log π_j (Menon et al., ICLR 2021, eq. 10).

    Args:
        class_counts: [C] training images a class, all above 0.
        tau: strength of the adjustment; 0 is plain cross-entropy, 1 is consistent for balanced accuracy.
    """

    adjustment: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], tau: float = 1.0) -> None:
        super().__init__()
        prior = log_prior(checks.as_class_vector("class_counts", class_counts))
        self.register_buffer("adjustment", tau * prior, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels [N] -> the mean over the batch."""
        return F.cross_entropy(logits.float() + self.adjustment, labels)


class BalancedSoftmax(LogitAdjusted):
    """Cross-entropy with softmax over n_j · exp(logit_j) (Ren et al., NeurIPS 2020, eq. 3): LogitAdjusted at tau 1."""

    def __init__(self, class_counts: Tensor | Sequence[int]) -> None:
        super().__init__(class_counts, tau=1.0)


class CBFocal(nn.Module):
    """Class-balanced focal loss (Cui et al., CVPR 2019, eq. 7), on one sigmoid a class.

    Args:
        class_counts: [C] training images a class, all above 0.
        beta: of the effective number of samples, in [0, 1).
        gamma: focusing exponent, 0 for plain sigmoid cross-entropy.
    """

    class_weights: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], beta: float = 0.9999, gamma: float = 1.0) -> None:
        super().__init__()
        weights = effective_number_weights(checks.as_class_vector("class_counts", class_counts), beta)
        self.register_buffer("class_weights", weights, persistent=False)
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels [N] -> the sum over classes, averaged over the batch."""
        targets = F.one_hot(labels, logits.shape[1]).to(torch.float32)
        signed = torch.where(targets == 1, logits.float(), -logits.float())  # log p_t = log sigmoid(signed)
        focal = -(F.logsigmoid(-signed) * self.gamma).exp() * F.logsigmoid(signed)
        return (self.class_weights[labels, None] * focal).sum(dim=1).mean()


class LDAM(nn.Module):
    """Label-distribution-aware margins, for a cosine classifier (Cao et al., NeurIPS 2019, eq. 13).

    `reweight` starts the deferred re-weighting (DRW): call it once, at the epoch where the classes are to be
    weighted by their effective number.

    Args:
        class_counts: [C] training images a class, all above 0.
        max_margin: the margin of the rarest class; class j has max_margin · (min n / n_j)^(1/4).
        scale: the cosine classifier's scale: margins are in units of cosine, logits are cosine · scale.
        beta: of the effective number of samples in `reweight`.
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
        counts = checks.as_class_vector("class_counts", class_counts)
        checks.check_class_counts(counts, rebalance=True)
        margins = max_margin * (counts.min() / counts.double()) ** 0.25
        self.register_buffer("class_counts", counts.clone(), persistent=False)
        self.register_buffer("margins", scale * margins.float(), persistent=False)
        self.register_buffer("class_weights", torch.ones(len(counts)))
        self.beta = beta

    def reweight(self) -> None:
        """Weights each class by its effective number from here on (DRW)."""
        self.class_weights.copy_(effective_number_weights(self.class_counts, self.beta))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C] of a cosine classifier with the same scale, labels [N] -> the weighted mean over the batch."""
        is_label = F.one_hot(labels, logits.shape[1]).to(torch.float32)
        margins = is_label * self.margins[labels, None]
        return F.cross_entropy(logits.float() - margins, labels, weight=self.class_weights)
