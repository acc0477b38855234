"""What the labels say of the anchors and the classes, counted once a call and handed down.

The kernels have no need of it: they count inside their first launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.batch import ContrastiveBatch, accumulation_dtype, ranks


class ClassStatistics(NamedTuple):
    """Everything that a histogram of the labels gives, for the anchors and for the classes."""

    classes: Tensor  # int64 [N] the anchors' classes as numbers in [0, N)
    positives: Tensor  # int64 [N] |P(i)|, the keys of the anchor's class without the anchor itself
    log_weights: Tensor  # [C] b of a key of class j, as an anchor of another class meets it
    same_class_terms: Tensor | None  # [N] what b has more on keys of the anchor's class; None: nothing


def class_statistics(batch: ContrastiveBatch) -> ClassStatistics:
    """Returns the statistics of a batch whose labels are in [0, num_classes), without a host synchronisation."""
    keys = keys_per_class(batch)
    keys_of_same_class = keys[batch.labels]
    # Compiled code takes the ranks always: the question would be one more graph.
    fits = not torch.compiler.is_compiling() and batch.num_classes <= len(batch.labels)
    return ClassStatistics(
        classes=batch.labels if fits else ranks(batch.labels),
        positives=keys_of_same_class - 1,
        log_weights=_log_weights(batch, keys),
        same_class_terms=_same_class_terms(keys_of_same_class, accumulation_dtype(batch))
        if batch.class_average
        else None,
    )


def keys_per_class(batch: ContrastiveBatch) -> Tensor:
    """Returns count[j], int64 [C]: the histogram of the anchors, and one more for each prototype."""
    nothing = torch.zeros(batch.num_classes, dtype=torch.int64, device=batch.labels.device)
    anchors = nothing.index_add(0, batch.labels, torch.ones_like(batch.labels))
    # Added last: where N equals C, Inductor would take a start of ones and the ones that are added for one buffer.
    return anchors + int(batch.prototypes is not None)


def positives_per_anchor(batch: ContrastiveBatch) -> Tensor:
    """Returns |P(i)|, int64 [N]: the keys of the anchor's class without the anchor itself."""
    return keys_per_class(batch)[batch.labels] - 1


def reduction_weights(positives: Tensor, reduction: str) -> Tensor:
    """Returns what each anchor's loss counts for in a "sum" or "mean", float64 [N], given |P(i)| [N].

    A "mean" is over the anchors that have a positive.
    """
    weights = (positives > 0).double()
    return weights / weights.sum().clamp(min=1) if reduction == "mean" else weights


def log_counts(class_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log n_j in the dtype [C]. A float64 count may exceed what float32 holds, its logarithm does not."""
    return class_counts.to(torch.promote_types(class_counts.dtype, dtype)).log().to(dtype)


def _log_weights(batch: ContrastiveBatch, keys: Tensor) -> Tensor:
    """Returns log n_j (eq. 4-6) − log count[j] (eq. 3, 5), each where it is asked for: [C]."""
    dtype = accumulation_dtype(batch)
    log_weights = torch.zeros(batch.num_classes, dtype=dtype, device=batch.labels.device)
    if batch.class_counts is not None:
        log_weights = log_weights + log_counts(batch.class_counts, dtype)
    if batch.class_average:
        # A class without a key has no b; 1 keeps its logarithm finite.
        log_weights = log_weights - keys.clamp(min=1).to(dtype).log()
    return log_weights


def _same_class_terms(keys_of_same_class: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log count − log(count − 1) of each anchor's class [N]: the anchor is not counted by itself."""
    count = keys_of_same_class.to(dtype)
    return torch.where(count > 1, count.log() - (count - 1).clamp(min=1).log(), 0.0)
