"""What is minimised: alpha · the cross-entropy side + beta · the contrastive side."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from rcl_fast.cross_entropy import LDAM, BalancedSoftmax, CBFocal, CrossEntropy, LogitAdjusted
from rcl_fast.losses import PRESETS, ContrastiveLoss
from rcl_fast.train.network.models import Outputs
from rcl_fast.train.options import Config
from rcl_fast.train.runtime import distributed
from rcl_fast.weights import compression_factors


class LossParts(NamedTuple):
    """The loss and its two sides, scalars; `contrastive` is None for losses without that side."""

    total: Tensor
    cross_entropy: Tensor
    contrastive: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """Returns the parts that there are, by their names in the log."""
        named = {"loss": self.total, "cross_entropy": self.cross_entropy, "contrastive": self.contrastive}
        return {name: part for name, part in named.items() if part is not None}


class Objective(nn.Module):
    """The loss of a configuration for class_counts [C], over the batches of all processes together.

    Every process gets the same values. The gradients are scaled for DistributedDataParallel, which divides by the
    number of processes.
    """

    def __init__(self, config: Config, class_counts: Tensor) -> None:
        super().__init__()
        self.options = config.loss
        self.cross_entropy = build_cross_entropy(config, class_counts)
        self.contrastive = None
        if config.contrastive:
            self.contrastive = ContrastiveLoss.preset(
                config.loss.loss,
                class_counts,
                temperature=config.loss.temperature,
                backend=config.loss.backend,
                group=distributed.group(),
            )

    def forward(self, outputs: Outputs, labels: Tensor) -> LossParts:
        cross_entropy = distributed.all_reduce_mean(self.cross_entropy(outputs.logits, labels), self._weight(labels))
        if self.contrastive is None:
            return LossParts(self.options.alpha * cross_entropy, cross_entropy, None)
        contrastive = self.contrastive(outputs.embeddings, labels, outputs.prototypes)
        total = self.options.alpha * cross_entropy + self.options.beta * contrastive
        return LossParts(total, cross_entropy, contrastive)

    def _weight(self, labels: Tensor) -> Tensor:
        """Returns the weight of these images in a mean over all processes' images: with LDAM by class, else 1 each."""
        if isinstance(self.cross_entropy, LDAM):
            return self.cross_entropy.class_weights[labels].sum()
        return labels.new_full((), len(labels))


def build_cross_entropy(config: Config, class_counts: Tensor) -> nn.Module:
    """Returns the cross-entropy side: a baseline by its name, logit adjustment beside every contrastive loss."""
    name = config.loss.loss
    if name == "ce":
        return CrossEntropy()
    if name == "balanced_softmax":
        return BalancedSoftmax(class_counts)
    if name == "cb_focal":
        return CBFocal(class_counts)
    if name == "ldam_drw":
        return LDAM(class_counts, scale=config.model.cosine_scale)
    if name == "logit_adjusted" or name in PRESETS:
        return LogitAdjusted(class_counts, config.loss.tau)
    raise ValueError(f"--loss {name} has no cross-entropy side: build_cross_entropy does not know it")


def starts_compression(config: Config, epoch: int) -> bool:
    """Returns whether features are compressed from this epoch (from 0) on: never before one epoch was validated."""
    rebalances = config.contrastive and PRESETS[config.loss.loss].rebalance
    start = max(1, config.epoch_of(config.loss.compression_from))
    return rebalances and config.loss.compression and epoch == start


def compress(objective: Objective, class_accuracy: Tensor) -> str:
    """Sets each class's factor by its validation accuracy [C]; returns a sentence with how many classes got which."""
    assert objective.contrastive is not None
    options = objective.options
    failing = int((class_accuracy < options.compression_threshold).sum())
    unknown = int(class_accuracy.isnan().sum())
    objective.contrastive.set_compression(
        compression_factors(
            class_accuracy,
            under=options.compression_under,
            rest=options.compression_rest,
            threshold=options.compression_threshold,
        )
    )
    return (
        f"{failing} of {len(class_accuracy)} classes are under {options.compression_threshold:.0%} on validation and "
        f"get the compression factor {options.compression_under:g}; {len(class_accuracy) - failing - unknown} others "
        f"get {options.compression_rest:g}" + (f"; {unknown} without a validation image keep 1" if unknown else "")
    )


def reweights(config: Config, epoch: int) -> bool:
    """Returns whether LDAM's deferred re-weighting is on in this epoch (from 0)."""
    return config.loss.loss == "ldam_drw" and epoch >= config.epoch_of(config.loss.drw_from)
