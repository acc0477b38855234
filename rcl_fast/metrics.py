"""What long-tailed classifiers are judged by: accuracies per class and their means, from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

MANY_ABOVE, FEW_BELOW = 100, 20  # training images a class: many > 100, medium 20 to 100, few < 20


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """int64 [C, C]: entry (i, j) counts the samples of class i that were called j."""
    pairs = labels.long() * num_classes + predictions.long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """float64 [C], fractions; NaN for a class without a sample."""
    return confusion.diagonal().double() / confusion.sum(dim=1)


def balanced_accuracy(class_accuracy: Tensor) -> float:
    """The arithmetic mean over the classes that have samples."""
    return class_accuracy.nanmean().item()


def harmonic_mean(class_accuracy: Tensor) -> float:
    """The harmonic mean over the classes that have samples; 0 where one class is at 0."""
    return 1 / (1 / class_accuracy).nanmean().item()


def worst_class_accuracy(class_accuracy: Tensor) -> float:
    """The lowest accuracy of a class that has samples."""
    return class_accuracy[~class_accuracy.isnan()].min().item()


def classes_at_zero(class_accuracy: Tensor) -> int:
    """How many classes are never recognised."""
    return int((class_accuracy == 0).sum())


def group_accuracies(class_accuracy: Tensor, class_counts: Tensor) -> dict[str, float | None]:
    """Mean accuracy of the many, medium and few classes by training images; None for a group without classes."""
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


def summary(confusion: Tensor, class_counts: Tensor) -> dict[str, float | int | None]:
    """Every figure above by its name, as plain numbers."""
    accuracy = per_class_accuracy(confusion)
    return {
        "balanced_accuracy": balanced_accuracy(accuracy),
        "harmonic_mean": harmonic_mean(accuracy),
        **group_accuracies(accuracy, class_counts),
        "worst_class": worst_class_accuracy(accuracy),
        "classes_at_zero": classes_at_zero(accuracy),
    }
