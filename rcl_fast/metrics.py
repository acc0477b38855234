"""Judges long-tailed classifiers: accuracies per class and their means from one confusion matrix, and how far their
confidence is to be trusted from one table of bins. Both add up over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

MANY_ABOVE, FEW_BELOW = 100, 20  # training images a class: many > 100, medium 20 to 100, few < 20
CALIBRATION_BINS = 15  # those of Guo et al.


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Returns int64 [C, C]: entry (i, j) counts the samples of class i that were predicted as j."""
    pairs = labels.long() * num_classes + predictions.long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """Returns each class's accuracy as a fraction, float64 [C]; NaN for a class without a sample."""
    return confusion.diagonal().double() / confusion.sum(dim=1)


def per_class_precision(confusion: Tensor) -> Tensor:
    """Returns the share of each class's predictions that are right, float64 [C]; NaN for a class never predicted."""
    return confusion.diagonal().double() / confusion.sum(dim=0)


def balanced_accuracy(class_accuracy: Tensor) -> float:
    """Returns the arithmetic mean over the classes that have samples."""
    return class_accuracy.nanmean().item()


def harmonic_mean(class_accuracy: Tensor) -> float:
    """Returns the harmonic mean over the classes that have samples; 0 where one class is at 0."""
    return 1 / (1 / class_accuracy).nanmean().item()


def geometric_mean(class_accuracy: Tensor) -> float:
    """Returns the geometric mean over the classes that have samples; 0 where one class is at 0."""
    return class_accuracy.log().nanmean().exp().item()


def worst_class_accuracy(class_accuracy: Tensor) -> float:
    """Returns the lowest accuracy of a class that has samples."""
    return class_accuracy[~class_accuracy.isnan()].min().item()


def classes_at_zero(class_accuracy: Tensor) -> int:
    """Returns how many classes are never recognised."""
    return int((class_accuracy == 0).sum())


def group_accuracies(class_accuracy: Tensor, class_counts: Tensor) -> dict[str, float | None]:
    """Returns the mean accuracy of the many, medium and few classes by training images; None for an empty group."""
    groups = {
        "many": class_counts > MANY_ABOVE,
        "medium": (class_counts >= FEW_BELOW) & (class_counts <= MANY_ABOVE),
        "few": class_counts < FEW_BELOW,
    }
    present = ~class_accuracy.isnan()
    return {
        name: balanced_accuracy(class_accuracy[group & present]) if (group & present).any() else None
        for name, group in groups.items()
    }


def reliability(probabilities: Tensor, labels: Tensor, num_bins: int = CALIBRATION_BINS) -> Tensor:
    """Counts samples by confidence, the largest probability, in equal bins (Guo et al., ICML 2017, section 2).

    Args:
        probabilities: floats [N, C], rows that sum to 1. Of logits: `logits.float().softmax(dim=1)`.
        labels: integers [N].

    Returns:
        float64 [num_bins, 3]: how many samples a bin has, the sum of their confidences, how many of them are right.
        Bin m (from 0) holds confidences in (m / num_bins, (m + 1) / num_bins], as in Guo et al.
    """
    confidence, predictions = probabilities.double().max(dim=1)
    bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (predictions == labels).double()], dim=1)
    # A product and no index_add: the same bits every time on a GPU, too.
    return torch.nn.functional.one_hot(bins, num_bins).double().T @ values


def expected_calibration_error(bins: Tensor) -> float:
    """Returns the mean over samples of |accuracy − confidence| of their bin, from `reliability` (Guo et al., eq. 3).

    NaN where there is no sample.
    """
    return ((bins[:, 2] - bins[:, 1]).abs().sum() / bins[:, 0].sum()).item()


def summary(confusion: Tensor, class_counts: Tensor, bins: Tensor | None = None) -> dict[str, float | int | None]:
    """Returns every figure above by its name, as plain numbers; the calibration error where `bins` are given."""
    accuracy = per_class_accuracy(confusion)
    return {
        "balanced_accuracy": balanced_accuracy(accuracy),
        "harmonic_mean": harmonic_mean(accuracy),
        "geometric_mean": geometric_mean(accuracy),
        **group_accuracies(accuracy, class_counts),
        "worst_class": worst_class_accuracy(accuracy),
        "classes_at_zero": classes_at_zero(accuracy),
        **({} if bins is None else {"expected_calibration_error": expected_calibration_error(bins)}),
    }
