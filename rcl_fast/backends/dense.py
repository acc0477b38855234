"""The loss over the whole N×M matrix, in plain PyTorch: short, and easy to follow or change."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rcl_fast.backends import from_losses
from rcl_fast.batch import ContrastiveBatch, anchors_and_prototypes


def losses(batch: ContrastiveBatch) -> Tensor:
    """Returns ℓ_i for each anchor [N]; 0 for an anchor without a positive. O(N·M) memory."""
    anchors, prototypes = anchors_and_prototypes(batch)
    keys = torch.cat([anchors, prototypes])  # [M, D]
    N, M = len(anchors), len(keys)
    key_labels = torch.cat([batch.labels, torch.arange(len(prototypes), device=batch.labels.device)])

    logits = anchors @ keys.T / batch.temperature  # s [N, M]
    itself = torch.eye(N, M, dtype=torch.bool, device=logits.device)
    same_class = batch.labels[:, None] == key_labels
    positives = same_class & ~itself
    positive_count = positives.sum(dim=1)
    has_positive = positive_count > 0

    log_weights = torch.zeros_like(logits)  # b [N, M]
    anchor_log_counts = logits.new_zeros(())
    if batch.class_counts is not None:
        log_counts = batch.class_counts.to(logits.dtype).log()
        log_weights = log_weights + log_counts[key_labels]
        anchor_log_counts = log_counts[batch.labels]
    if batch.class_average:
        keys_of_class = same_class.sum(dim=0) + int(batch.prototypes is not None)  # [M], of each key's class
        met = keys_of_class - same_class.int()
        log_weights = log_weights - met.clamp(min=1).to(logits.dtype).log()

    # An anchor without a positive keeps itself as a key: its row stays finite, and is dropped below.
    excluded = itself & has_positive[:, None]
    log_sum_exp = torch.logsumexp((logits + log_weights).masked_fill(excluded, -torch.inf), dim=1)
    positive_mean = (logits * positives).sum(dim=1) / positive_count.clamp(min=1)
    return torch.where(has_positive, log_sum_exp - positive_mean - anchor_log_counts, 0.0)


total = partial(from_losses.total, losses)
forward_rows = partial(from_losses.forward_rows, losses)
backward_rows = partial(from_losses.backward_rows, losses)
