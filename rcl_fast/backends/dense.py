"""The loss over the whole N×M matrix, in plain PyTorch: short, and easy to follow or change.

Differentiable any number of times, and by `torch.func` (`vmap` over features, keys and prototypes, labels shared).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rcl_fast.autograd import product
from rcl_fast.backends import from_losses
from rcl_fast.batch import ContrastiveBatch, compressed_rows, labels_of_keys
from rcl_fast.class_statistics import keys_per_class, log_counts


def losses(batch: ContrastiveBatch) -> Tensor:
    """Returns ℓ_i for each anchor [N]; 0 for an anchor without a positive. O(N·M) memory."""
    anchors, more_keys, prototypes = compressed_rows(batch)
    keys = torch.cat([anchors if batch.anchors_are_keys else anchors[:0], more_keys, prototypes])  # [M, D]
    key_labels = torch.cat([labels_of_keys(batch), torch.arange(len(prototypes), device=batch.labels.device)])

    # In this order a product of rows that the temperature brings back into range does not leave it.
    logits = product(anchors / batch.temperature, keys.T)  # s [N, M]
    itself = torch.eye(len(anchors), len(keys), dtype=torch.bool, device=logits.device) & batch.anchors_are_keys
    same_class = batch.labels[:, None] == key_labels
    positives = same_class & ~itself
    positive_count = positives.sum(dim=1)
    has_positive = positive_count > 0

    log_weights = torch.zeros_like(logits)  # b [N, M]
    anchor_log_counts = logits.new_zeros(())
    if batch.class_counts is not None:
        log_n = log_counts(batch.class_counts, logits.dtype)
        log_weights = log_weights + log_n[key_labels]
        anchor_log_counts = log_n[batch.labels]
    if batch.class_average:
        # An anchor that is a key is left out of the count of its class.
        met = keys_per_class(batch)[key_labels] - (same_class & batch.anchors_are_keys).int()
        log_weights = log_weights - met.clamp(min=1).to(logits.dtype).log()

    weighted = (logits + log_weights).masked_fill(itself, -torch.inf)
    # An anchor without a positive may have no key at all: its row stays finite, and is dropped below.
    log_sum_exp = _log_sum_exp(weighted.masked_fill(~has_positive[:, None], 0.0))
    shares = 1 / positive_count.clamp(min=1).to(logits.dtype)[:, None]  # before the sum, which might overflow
    positive_mean = torch.where(positives, logits * shares, 0.0).sum(dim=1)
    return torch.where(has_positive, log_sum_exp - positive_mean - anchor_log_counts, 0.0)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Returns log Σ_k exp(logits_ik) [N], with a gradient that adds up to 1 for each row.

    That of `torch.logsumexp` is exp(logit − lse): next to a large logit the sum of a few equal ones is rounded away.
    """
    shift = torch.logsumexp(logits.detach(), dim=1)
    return (logits - shift[:, None]).exp().sum(dim=1).log() + shift


total = partial(from_losses.total, losses)
forward_rows = partial(from_losses.forward_rows, losses)
backward_rows = partial(from_losses.backward_rows, losses)
