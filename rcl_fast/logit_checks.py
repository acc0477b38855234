"""Checks logits and the labels beside them, for the losses of logits; checks.py has what all losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from rcl_fast import checks

IGNORED = -100  # PyTorch's ignore_index: the label of a sample that a loss of logits leaves out
SUM_TOLERANCE = 0.01  # of probabilities: in bfloat16 a number near 1 and its part of a sum round by 0.004 each


def check_logits(logits: Tensor, class_vector: Tensor | None = None) -> None:
    """Raises unless logits are [N, C], floating point, with the C and the device of what a loss holds of each class."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor [N, C], got {type(logits).__name__}")
    checks.check_floating("logits", logits, "the classifier's output")
    if logits.ndim != 2 or logits.shape[1] == 0:
        hint = "; of pixels or tokens make rows: logits.movedim(1, -1).flatten(0, -2), labels.flatten()"
        raise ValueError(
            f"logits must be [N, C], a row a sample and a column a class, with C >= 1; got {list(logits.shape)}"
            f"{hint if logits.ndim > 2 else ''}"
        )
    if class_vector is None:
        return
    if len(class_vector) != logits.shape[1]:
        raise ValueError(
            f"logits must have one column per class, [N, {len(class_vector)}], as class_counts have "
            f"{len(class_vector)} classes; got {list(logits.shape)}"
        )
    checks.check_device("class_counts", class_vector, logits.device, "logits")


def check_class_labels(labels: Tensor, logits: Tensor) -> None:
    """Raises unless labels are integers [N] for logits [N, C], on their device.

    Raises ValueError for a label that is neither in [0, C) nor −100, where values can be read.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of integers, got {type(labels).__name__}")
    checks.check_integers(labels)
    samples, classes = logits.shape
    if list(labels.shape) != [samples]:
        hint = "; where each row has a single 1, take labels.argmax(dim=1)" if labels.shape == logits.shape else ""
        raise ValueError(
            f"labels must have shape {[samples]} to match logits {[samples, classes]}, got {list(labels.shape)}{hint}"
        )
    checks.check_device("labels", labels, logits.device, "logits")
    if not checks.values_can_be_read(labels, validate=False):
        return
    labels = labels.long()  # unsigned integers can't be compared in PyTorch
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {classes}), the columns of logits, or be {IGNORED} for samples to leave out; "
            f"sample {first} has {int(labels[first])} ({int(wrong.sum())} such of {samples})"
        )


def check_class_or_soft_labels(labels: Tensor, logits: Tensor) -> None:
    """Raises unless labels are `check_class_labels`' integers, or floating [N, C], probabilities in each row."""
    if not isinstance(labels, Tensor) or not labels.dtype.is_floating_point or labels.ndim < 2:
        check_class_labels(labels, logits)
        return
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels must be integers {[len(logits)]}, or probabilities {list(logits.shape)} as logits are; got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    checks.check_device("labels", labels, logits.device, "logits")
    if not checks.values_can_be_read(labels, validate=False):
        return
    sums = labels.sum(dim=1, dtype=torch.float64)
    wrong = ~((sums - 1).abs() <= SUM_TOLERANCE) | (labels < 0).any(dim=1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            "floating labels must be probabilities, none below 0, that sum to 1 in each row; sample "
            f"{first} sums to {sums[first].item():g}, its least is {labels[first].min().item():g} ({int(wrong.sum())} "
            f"such of {len(labels)}); of several labels for one sample make shares: labels / labels.sum(dim=1, "
            "keepdim=True)"
        )
