"""The networks: backbones by name, and the long-tailed classifier with its heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from rcl_fast.heads import CosineClassifier, ProjectionHead, PrototypeHead
from rcl_fast.train.checks import check_arch
from rcl_fast.train.options import Config, ModelOptions, has_prototypes


class Outputs(NamedTuple):
    """What the loss needs of one batch."""

    logits: Tensor  # [B, C] of the first view
    embeddings: Tensor | None  # [B, V, D] of the other views
    prototypes: Tensor | None  # [C, D]


class LongTailedClassifier(nn.Module):
    """A backbone with a classifier and, for a contrastive loss, a projection head and a prototypes' head.

    Args:
        embeds: build the projection head; `has_prototypes`: build the prototypes' head too.
    """

    def __init__(self, options: ModelOptions, num_classes: int, *, embeds: bool, has_prototypes: bool) -> None:
        super().__init__()
        self.backbone, width = build_backbone(options.arch)
        self.classifier = build_classifier(options, width, num_classes)
        shape = (width, options.head_hidden, options.head_out)
        self.projection_head = ProjectionHead(*shape) if embeds else None
        self.prototype_head = PrototypeHead(*shape) if has_prototypes else None

    def forward(self, views: list[Tensor], with_prototypes: bool = True) -> Outputs:
        """Classifies the first of the views [B, 3, S, S] and embeds the others, in one pass of the backbone.

        `with_prototypes`: compute the prototypes, where the loss has any; of several parts of a batch, one needs them.
        """
        batch = len(views[0])
        features = self.backbone(torch.cat(views))
        logits = self.classifier(features[:batch])
        if self.projection_head is None:
            return Outputs(logits, None, None)
        embeddings = self.projection_head(features[batch:]).unflatten(0, (-1, batch)).transpose(0, 1)
        if self.prototype_head is None or not with_prototypes:
            return Outputs(logits, embeddings, None)
        return Outputs(logits, embeddings, self.prototype_head(self.classifier.weight))


def build_network(config: Config, num_classes: int) -> LongTailedClassifier:
    """Returns the network of a run's configuration, with new weights, on the CPU."""
    return LongTailedClassifier(
        config.model, num_classes, embeds=config.contrastive, has_prototypes=has_prototypes(config)
    )


def build_classifier(options: ModelOptions, width: int, num_classes: int) -> nn.Module:
    """Returns the classifier with new weights: features [N, width] -> logits [N, num_classes]."""
    if options.classifier == "cosine":
        return CosineClassifier(width, num_classes, options.cosine_scale)
    return nn.Linear(width, num_classes)


def build_backbone(arch: str) -> tuple[nn.Module, int]:
    """Returns a backbone with new weights, images [N, 3, S, S] -> features [N, d], and d. Raises UserError."""
    check_arch(arch)
    if arch == "resnet32":
        return ResNet32(), 64
    if arch.startswith("timm/"):
        return _timm_backbone(arch.removeprefix("timm/"))
    make = {"resnet50": torchvision.models.resnet50, "resnext50": torchvision.models.resnext50_32x4d}[arch]
    network = make(weights=None)
    network.fc = nn.Identity()
    return network, 2048


def _timm_backbone(name: str) -> tuple[nn.Module, int]:
    import timm  # slow to import, and only these architectures need it

    network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    # Some families have a hidden layer after the pooling; the output then has its width.
    return network, getattr(network, "head_hidden_size", None) or network.num_features


class ResNet32(nn.Module):
    """The CIFAR ResNet-32 of He et al. (2016), section 4.2: widths 16/32/64, option-A shortcuts, features [N, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3x3(3, 16, stride=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(_stage(16, 16, stride=1), _stage(16, 32, stride=2), _stage(32, 64, stride=2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(self.stem(images)).mean(dim=(2, 3))


class _Block(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv3x3(in_width, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _conv3x3(width, width, stride=1),
            nn.BatchNorm2d(width),
        )
        self.stride = stride
        self.padding = (width - in_width) // 2

    def forward(self, x: Tensor) -> Tensor:
        # Option A: every second pixel, new channels zero; no parameters.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.body(x) + shortcut)


def _stage(in_width: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(in_width, width, stride), *(_Block(width, width, stride=1) for _ in range(4)))


def _conv3x3(in_width: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
