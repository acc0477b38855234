"""The modules on top of the backbone: projection head, prototypes' head, cosine classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Sequential):
    """Linear – BatchNorm – ReLU – Linear, from features [N, d] to raw embeddings [N, D] (BCL, section 3.3)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.BatchNorm1d(hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, out_features),
        )


class PrototypeHead(ProjectionHead):
    """A second head of the same shape on the classifier's weight rows: [C, d] -> prototypes [C, D] (BCL, section 3.3).

    BatchNorm runs over the C classes; nothing is detached, so that the classifier learns from the contrastive loss.
    """


class CosineClassifier(nn.Module):
    """scale · cos(feature, weight_j): features [N, d] -> float32 logits [N, C], both sides normalised, no bias."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear's
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        # In 16 bits logits near the scale are so coarse that many classes tie.
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(features.float(), dim=1), F.normalize(self.weight.float(), dim=1))
