"""A classifier anew on a frozen backbone: cRT, tau-normalisation and LWS (Kang et al., ICLR 2020, section 4)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from rcl_fast.train.data.loader import Batch
from rcl_fast.train.machine import Machine

Method = Literal["crt", "tau_norm", "lws"]


def tau_normalized(classifier: nn.Linear, tau: float) -> nn.Linear:
    """A copy whose weight rows w_j [d] are w_j / ‖w_j‖^tau, and whose bias is 0, as the authors leave it out.

    tau 0 keeps the norms, 1 makes them all 1.
    """
    weight = classifier.weight.detach()
    norms = weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)  # a row of zeros stays one
    return _linear(weight / norms.pow(tau), torch.zeros_like(weight[:, 0]))


class ScaledClassifier(nn.Module):
    """LWS: a frozen linear classifier with one learnable factor a class on its logits, 1 at first.

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
        """The same as one linear classifier."""
        scales = self.scales.detach()
        return _linear(scales[:, None] * self.weight, scales * self.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def train_epoch(
    classifier: nn.Module, backbone: nn.Module, optimizer: SGD, batches: Iterator[Batch], machine: Machine
) -> dict[str, float]:
    """One pass of cross-entropy over `batches`; the backbone is as in evaluation, BatchNorm's statistics too.

    Returns the mean loss, images a second, and the share of time in which the loader was waited for.
    """
    backbone.eval()
    began, waiting, images = time.perf_counter(), 0.0, 0
    total = torch.zeros((), device=machine.device)  # read once, at the end: a GPU then never waits
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waiting += time.perf_counter() - asked
        if batch is None:
            break
        labels = machine.labels(batch["label"])
        with torch.no_grad(), machine.autocast():
            features = backbone(machine.images(batch["x1"])).float()
        loss = F.cross_entropy(classifier(features), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        images += len(labels)
        total += len(labels) * loss.detach()
    mean, seconds = total.item() / max(images, 1), time.perf_counter() - began
    return {"loss": mean, "images_per_second": images / seconds, "waiting_for_data": waiting / seconds}
