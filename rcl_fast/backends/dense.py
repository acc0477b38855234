"""The loss over the whole N×M matrix, in plain PyTorch: short, and easy to follow or change."""

from __future__ import annotations

import torch
from torch import Tensor

from rcl_fast.batch import ContrastiveBatch, anchors_and_prototypes, keys_per_class


def contrastive_loss(batch: ContrastiveBatch) -> Tensor:
    """ℓ_i for each anchor [N]; 0 for an anchor without a positive. O(N·M) memory."""
    anchors, prototypes = anchors_and_prototypes(batch)
    keys = torch.cat([anchors, prototypes])  # [M, D]
    N, M = len(anchors), len(keys)
    key_labels = torch.cat([batch.labels, torch.arange(len(prototypes), device=batch.labels.device)])

    logits = anchors @ keys.T / batch.temperature  # s [N, M]
    itself = torch.eye(N, M, dtype=torch.bool, device=logits.device)
    own_class = batch.labels[:, None] == key_labels
    positives = own_class & ~itself
    positive_count = positives.sum(dim=1)
    has_positive = positive_count > 0

    log_weights = torch.zeros_like(logits)  # b [N, M]
    anchor_log_counts = logits.new_zeros(())
    if batch.class_counts is not None:
        log_counts = batch.class_counts.to(logits.dtype).log()
        log_weights = log_weights + log_counts[key_labels]
        anchor_log_counts = log_counts[batch.labels]
    if batch.class_average:
        met = keys_per_class(batch)[key_labels] - own_class.int()
        log_weights = log_weights - met.clamp(min=1).to(logits.dtype).log()

    # An anchor without a positive keeps itself as a key: its row stays finite, and is dropped below.
    excluded = itself & has_positive[:, None]
    log_sum_exp = torch.logsumexp((logits + log_weights).masked_fill(excluded, -torch.inf), dim=1)
    positive_mean = (logits * positives).sum(dim=1) / positive_count.clamp(min=1)
    return torch.where(has_positive, log_sum_exp - positive_mean - anchor_log_counts, 0.0)
