"""Classifiers on a frozen backbone: tau-normalisation and LWS (Kang et al., ICLR 2020, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tau_normalized(classifier: nn.Linear, tau: float) -> nn.Linear:
    """Returns a copy whose weight rows w_j [d] are w_j / ‖w_j‖^tau, and whose bias is 0, as the authors leave it out.

    tau 0 keeps the norms, 1 makes them all 1.
    """
    weight = classifier.weight.detach()
    norms = weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)  # a row of zeros stays one
    return _linear(weight / norms.pow(tau), torch.zeros_like(weight[:, 0]))


class ScaledClassifier(nn.Module):
    """LWS: a frozen linear classifier with one learnable factor for each class on its logits, 1 at first.

    Features [N, d] -> f_j · (w_j x + b_j), [N, C]: the bias is scaled too, as in the authors' code.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", classifier.weight.detach().clone())
        self.register_buffer("bias", classifier.bias.detach().clone())
        self.scales = nn.Parameter(torch.ones_like(self.bias))

    def forward(self, features: Tensor) -> Tensor:
        return self.scales * F.linear(features, self.weight, self.bias)

    def merged(self) -> nn.Linear:
        """Returns the same function as one linear classifier."""
        scales = self.scales.detach()
        return _linear(scales[:, None] * self.weight, scales * self.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear
