"""What every benchmark of the loss measures: cases, their inputs, our backends, and published code by its path.

BCL's BalSCL needs one line mended on a current PyTorch, which refuses to index a CPU matrix with CUDA indices:
`torch.eye(n)[targets]` becomes `torch.eye(n, device=device)[targets]`, in memory, as the file is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcl_fast import contrastive_loss

TEMPERATURE = 0.1


class Case(NamedTuple):
    """N anchors = 2 views of N/2 samples with long-tailed labels, and prototypes: BCL's loss."""

    name: str
    anchors: int
    classes: int
    dimensions: int

    def __str__(self) -> str:
        return f"{self.name}: {self.anchors:,} anchors, C={self.classes}, D={self.dimensions}"

    @property
    def operations(self) -> int:
        """Returns the operations of the products that are needed: 2·N·M·D forward, 4·N·M·D and 4·C·N·D backward."""
        N, C, D = self.anchors, self.classes, self.dimensions
        return 6 * N * (N + C) * D + 4 * C * N * D

    @property
    def matrix_bytes(self) -> int:
        """Returns the bytes of one float32 matrix of all similarities."""
        return 4 * self.anchors * (self.anchors + self.classes)


class Inputs(NamedTuple):
    features: Tensor  # [N, D], a leaf; the views of a sample are neighbours
    labels: Tensor  # [N]
    prototypes: Tensor  # [C, D], a leaf


Loss = Callable[[Inputs], Tensor]


def draw(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    shares = 1 / torch.arange(1, case.classes + 1, device=device).float()
    labels = torch.multinomial(shares, case.anchors // 2, replacement=True, generator=generator)

    def rows(count: int) -> Tensor:
        return torch.randn(count, case.dimensions, device=device, dtype=dtype, generator=generator).requires_grad_()

    return Inputs(rows(case.anchors), labels.repeat_interleave(2), rows(case.classes))


def ours(backend: str, **options: Any) -> Loss:
    """Returns the public function, as a training loop calls it; `options` are further arguments of it."""

    def loss(inputs: Inputs) -> Tensor:
        features, labels, prototypes = inputs
        return contrastive_loss(
            features,
            labels,
            prototypes=prototypes,
            temperature=TEMPERATURE,
            class_average=True,
            backend=backend,
            **options,
        )

    return loss


def available_backends(device: torch.device) -> tuple[str, ...]:
    """Returns the backends that the machine runs, the fastest first; the float64 reference is for tests."""
    return ("triton", "tiled", "dense") if device.type == "cuda" else ("tiled", "dense")


def published_bcl(path: Path, classes: int) -> Loss:
    """Returns BCL's BalSCL, which wants views [B, 2, D] and unit rows."""
    mended = path.read_text(encoding="utf-8").replace(
        "torch.eye(len(self.cls_num_list))[", "torch.eye(len(self.cls_num_list), device=device)["
    )
    criterion = _module("published_bcl", path, mended).BalSCL([1] * classes, temperature=TEMPERATURE)

    def loss(inputs: Inputs) -> Tensor:
        features, labels, prototypes = inputs
        return criterion(
            F.normalize(prototypes, dim=1), F.normalize(features, dim=1).unflatten(0, (-1, 2)), labels[::2]
        )

    return loss


def supcontrast(path: Path) -> Loss:
    """Returns SupContrast's SupConLoss, which has no prototypes."""
    module = _module("published_supcontrast", path, path.read_text(encoding="utf-8"))
    criterion = module.SupConLoss(temperature=TEMPERATURE, base_temperature=TEMPERATURE)

    def loss(inputs: Inputs) -> Tensor:
        return criterion(F.normalize(inputs.features, dim=1).unflatten(0, (-1, 2)), inputs.labels[::2])

    return loss


def metric_learning() -> Loss:
    """Returns pytorch-metric-learning's SupConLoss, which has no prototypes and normalises by itself."""
    from pytorch_metric_learning.losses import SupConLoss

    criterion = SupConLoss(temperature=TEMPERATURE)
    return lambda inputs: criterion(inputs.features, inputs.labels)


def _module(name: str, path: Path, text: str) -> ModuleType:
    module = ModuleType(name)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def run(loss: Loss, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Runs forward and backward; returns the gradients of features and prototypes (None: the loss has none)."""
    return torch.autograd.grad(loss(inputs), (inputs.features, inputs.prototypes), allow_unused=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
