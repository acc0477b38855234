"""The losses as modules: the contrastive one with its four presets, and the cross-entropy side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from rcl_fast import checks
from rcl_fast.functional import BACKENDS, contrastive_loss
from rcl_fast.weights import effective_number_weights, log_prior


class Preset(NamedTuple):
    """A named loss of the paper."""

    class_average: bool
    rebalance: bool
    prototypes: bool


PRESETS = {
    "scl": Preset(class_average=False, rebalance=False, prototypes=False),
    "bcl": Preset(class_average=True, rebalance=False, prototypes=True),
    "scl_rcl": Preset(class_average=False, rebalance=True, prototypes=False),
    "bcl_rcl": Preset(class_average=True, rebalance=True, prototypes=True),
}


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` with its options fixed; the options' values are checked once, here.

    Args:
        class_counts: [C] training images a class; needed by `rebalance`. A buffer: moves with the module.
        compression: [C] factors, or None for 1 everywhere; `set_compression` changes them during training.
        others: as in `contrastive_loss`.

    Raises:
        TypeError, ValueError: as `contrastive_loss` does.
    """

    class_counts: Tensor | None
    compression: Tensor | None

    def __init__(
        self,
        class_counts: Tensor | Sequence[int] | None = None,
        *,
        temperature: float = 0.1,
        class_average: bool = False,
        rebalance: bool = False,
        compression: Tensor | Sequence[float] | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        group: ProcessGroup | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__()
        checks.check_temperature(temperature)
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        checks.check_choice("backend", backend, BACKENDS)
        checks.check_group(group)
        if class_counts is not None:
            class_counts = checks.as_class_vector("class_counts", class_counts).clone()
            checks.check_class_counts(class_counts, rebalance, validate=True)
        elif rebalance:
            raise ValueError("rebalance=True needs class_counts: [C], the training images of each class")
        self.register_buffer("class_counts", class_counts, persistent=False)
        self.register_buffer("compression", None, persistent=False)
        self.set_compression(compression)
        self.temperature = temperature
        self.class_average = class_average
        self.rebalance = rebalance
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend
        self.group = group
        self.validate = validate
        self.needs_prototypes: bool | None = None  # None: with or without

    @classmethod
    def preset(cls, name: str, class_counts: Tensor | Sequence[int], **options: Any) -> ContrastiveLoss:
        """One of the paper's losses: "scl", "bcl", "scl_rcl" (its "RCL") or "bcl_rcl" (its "BCL+RCL").

        >>> criterion = ContrastiveLoss.preset("bcl_rcl", class_counts)
        >>> loss = criterion(features, labels, prototypes)
        """
        checks.check_choice("preset", name, tuple(PRESETS))
        preset = PRESETS[name]
        fixed: dict[str, Any] = {"class_average": preset.class_average, "rebalance": preset.rebalance}
        for option in fixed.keys() & options.keys():
            raise TypeError(f"the preset {name!r} sets {option}; use ContrastiveLoss({option}=...) for another mix")
        loss = cls(class_counts, **fixed, **options)
        loss.needs_prototypes = preset.prototypes
        return loss

    def set_compression(self, compression: Tensor | Sequence[float] | None) -> None:
        """New factors [C] for the unit features of each class (section 3.3.2); None: 1 everywhere."""
        if compression is not None:
            compression = checks.as_class_vector("compression", compression).clone()
            checks.check_compression(compression, validate=True)
            if self.class_counts is not None:
                rows = {"class_counts": len(self.class_counts), "compression": len(compression)}
                checks.check_class_rows_agree(rows)
                compression = compression.to(self.class_counts.device)
        self.compression = compression

    def forward(self, features: Tensor, labels: Tensor, prototypes: Tensor | None = None) -> Tensor:
        """features [N, D] or [B, V, D], labels [N] or [B], prototypes [C, D] -> a scalar, or [N] for "none"."""
        if self.needs_prototypes is not None and self.needs_prototypes != (prototypes is not None):
            wants = "needs prototypes [C, D]" if self.needs_prototypes else "is defined without prototypes"
            raise ValueError(f"this preset {wants}; ContrastiveLoss(...) without a preset takes either")
        return contrastive_loss(
            features,
            labels,
            class_counts=self.class_counts,
            prototypes=prototypes,
            temperature=self.temperature,
            class_average=self.class_average,
            rebalance=self.rebalance,
            compression=self.compression,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
            group=self.group,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        shown = ("temperature", "class_average", "rebalance", "normalize", "reduction", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class CrossEntropy(nn.Module):
    """Plain cross-entropy of logits [N, C] and labels [N]: the mean over the batch, a scalar."""

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
        """From here on each class counts by its effective number (DRW)."""
        self.class_weights.copy_(effective_number_weights(self.class_counts, self.beta))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C] of a cosine classifier with the same scale, labels [N] -> the weighted mean over the batch."""
        own = F.one_hot(labels, logits.shape[1]).to(torch.float32)
        return F.cross_entropy(logits.float() - own * self.margins[labels, None], labels, weight=self.class_weights)
