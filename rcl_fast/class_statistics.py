"""What the labels say of the anchors and the classes, counted once a call and handed down.

The kernels have no need of it: they count inside their first launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.batch import ContrastiveBatch, accumulation_dtype, labels_of_keys, ranks


class ClassStatistics(NamedTuple):
    """Everything that a histogram of the labels gives, for the anchors and for the classes."""

    classes: Tensor  # int64 [N] the anchors' classes as numbers in [0, N + Q)
    key_classes: Tensor  # int64 [Q] those of the keys
    positives: Tensor  # int64 [N] |P(i)|, the keys of the anchor's class without the anchor itself
    log_weights: Tensor  # [C] b of a key of class j, as an anchor of another class meets it
    same_class_terms: Tensor | None  # [N] what b has more on keys of the anchor's class; None: nothing


def class_statistics(batch: ContrastiveBatch) -> ClassStatistics:
    """Returns the statistics of a batch whose labels are in [0, num_classes), without a host synchronisation."""
    keys = keys_per_class(batch)
    keys_of_same_class = keys[batch.labels]
    classes, key_classes = _small_classes(batch)
    has_terms = batch.class_average and batch.anchors_are_keys
    return ClassStatistics(
        classes=classes,
        key_classes=key_classes,
        positives=keys_of_same_class - int(batch.anchors_are_keys),
        log_weights=_log_weights(batch, keys),
        same_class_terms=_same_class_terms(keys_of_same_class, accumulation_dtype(batch)) if has_terms else None,
    )


def keys_per_class(batch: ContrastiveBatch) -> Tensor:
    """Returns count[j], int64 [C]: the histogram of anchors and keys, and one more for each prototype."""
    nothing = torch.zeros(batch.num_classes, dtype=torch.int64, device=batch.labels.device)
    labels = labels_of_keys(batch)
    counted = nothing.index_add(0, labels, torch.ones_like(labels))
    # Added last: where N equals C, Inductor would take a start of ones and the ones that are added for one buffer.
    return counted + int(batch.prototypes is not None)


def positives_per_anchor(batch: ContrastiveBatch) -> Tensor:
    """Returns |P(i)|, int64 [N]: the keys of the anchor's class without the anchor itself."""
    return keys_per_class(batch)[batch.labels] - int(batch.anchors_are_keys)


def reduction_weights(positives: Tensor, reduction: str) -> Tensor:
    """Returns what each anchor's loss counts for in a "sum" or "mean", float64 [N], given |P(i)| [N].

    A "mean" is over the anchors that have a positive.
    """
    weights = (positives > 0).double()
    return weights / weights.sum().clamp(min=1) if reduction == "mean" else weights


def log_counts(class_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log n_j in the dtype [C]. A float64 count may exceed what float32 holds, its logarithm does not."""
    return class_counts.to(torch.promote_types(class_counts.dtype, dtype)).log().to(dtype)


def _small_classes(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Returns the classes of anchors [N] and keys [Q] as numbers in [0, N + Q)."""
    key_labels = batch.labels[:0] if batch.key_labels is None else batch.key_labels
    N = len(batch.labels)
    # Compiled code takes the ranks always: the question would be one more graph.
    if not torch.compiler.is_compiling() and batch.num_classes <= N + len(key_labels):
        return batch.labels, key_labels
    together = ranks(batch.labels if batch.key_labels is None else torch.cat([batch.labels, key_labels]))
    return together[:N], together[N:]


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
