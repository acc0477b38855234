"""One pass over a set of images: the confusion matrix, and features for the report's picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.metrics import confusion_matrix
from rcl_fast.train.data.loader import Loader
from rcl_fast.train.machine import Machine
from rcl_fast.train.models import LongTailedClassifier


class Evaluation(NamedTuple):
    """On the CPU: confusion int64 [C, C]; features float32 [n, d] of the pictured images, and their labels [n]."""

    confusion: Tensor
    features: Tensor
    labels: Tensor


@torch.no_grad()
def evaluate(
    model: LongTailedClassifier, loader: Loader, num_classes: int, machine: Machine, pictured: Tensor | None = None
) -> Evaluation:
    """Classify by the raw logits, without adjustment. `pictured`: bool [n], the images whose features are kept."""
    model.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=machine.device)
    features_kept, labels_kept = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.int64)]
    for batch in loader.epoch(0):
        labels = machine.labels(batch["label"])
        with machine.autocast():
            features = model.backbone(machine.images(batch["x1"])).float()
        predictions = model.classifier(features).argmax(dim=1)  # in float32: 16-bit logits tie
        confusion += confusion_matrix(labels, predictions, num_classes)
        if pictured is not None:
            keep = pictured[batch["index"]]
            features_kept.append(features.cpu()[keep])
            labels_kept.append(batch["label"][keep])
    return Evaluation(confusion.cpu(), torch.cat(features_kept[1:] or features_kept), torch.cat(labels_kept))


def some_of(count: int, most: int = 5000) -> Tensor:
    """bool [count]: a random choice, always the same, of at most `most` images to picture."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]] = True
    return chosen
