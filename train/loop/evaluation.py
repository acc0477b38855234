"""One pass over a set of images: the confusion matrix, the bins of calibration, features for the report's picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rcl_fast.metrics import CALIBRATION_BINS, confusion_matrix, reliability
from rcl_fast.train.loaders.base import Batch, Loader
from rcl_fast.train.network.models import LongTailedClassifier
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.machine import Machine
from rcl_fast.train.runtime.signals import Preempted, never


class Evaluation(NamedTuple):
    """On the CPU: confusion int64 [C, C]; reliability float64 [M, 3], `metrics.reliability` of the softmax of the raw
    logits; features float32 [n, d] of the pictured images, and their labels [n]."""

    confusion: Tensor
    reliability: Tensor
    features: Tensor
    labels: Tensor


@torch.no_grad()
def evaluate(
    model: LongTailedClassifier,
    loader: Loader,
    num_classes: int,
    machine: Machine,
    pictured: Tensor | None = None,
    stopping: Callable[[], bool] = never,
) -> Evaluation:
    """Classify by the raw logits, without adjustment; each process its share, and what is counted is of all.

    The features are all on the main process, in the order of the images; elsewhere there are this process's. The
    network runs as it is, also where training compiles it: each other size of batch would be another graph.

    Args:
        pictured: bool [n], the images whose features are kept.
        stopping: says whether a signal has come.

    Raises:
        Preempted: `stopping` on any process.
    """
    model.eval()
    distributed.take_buffers_of_main(model)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=machine.device)
    bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=machine.device)
    features_kept, labels_kept = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.int64)]
    for batch in _until_all_are_done(loader, stopping):
        labels = machine.labels(batch["label"])
        with torch.compiler.set_stance("force_eager"), machine.autocast():
            features = model.backbone(machine.images(batch["x1"])).float()
        counted = count(model.classifier, features, labels, num_classes)
        confusion += counted.confusion
        bins += counted.reliability
        if pictured is not None:
            keep = pictured[batch["index"]]
            features_kept.append(features.cpu()[keep])
            labels_kept.append(batch["label"][keep])
    confusion, bins = distributed.summed(confusion).cpu(), distributed.summed(bins).cpu()
    mine = torch.cat(features_kept[1:] or features_kept), torch.cat(labels_kept)
    if pictured is None:
        return Evaluation(confusion, bins, *mine)
    # A process without images has no features, not even a width of them.
    features_of, labels_of = zip(*distributed.gathered_on_main(mine), strict=True)
    features = torch.cat([f for f in features_of if len(f)] or [mine[0]])
    return Evaluation(confusion, bins, features, torch.cat(labels_of))


class Counted(NamedTuple):
    """As in Evaluation."""

    confusion: Tensor
    reliability: Tensor


@torch.no_grad()
def count(classifier: nn.Module, features: Tensor, labels: Tensor, num_classes: int) -> Counted:
    """What a classifier makes of features float32 [n, d]: in 16 bits, logits tie."""
    logits = classifier(features)
    return Counted(
        confusion_matrix(labels, logits.argmax(dim=1), num_classes), reliability(logits.softmax(dim=1), labels)
    )


def _until_all_are_done(loader: Loader, stopping: Callable[[], bool]) -> Iterator[Batch]:
    """This process's batches; it then waits until the others have had theirs. Raises Preempted."""
    batches = loader.epoch(0)
    while True:
        batch = next(batches, None)
        going_on, stopped = distributed.totals(batch is not None, stopping())
        if stopped:
            raise Preempted
        if not going_on:
            return
        if batch is not None:
            yield batch


def some_of(count: int, most: int = 5000) -> Tensor:
    """bool [count]: a random choice, always the same, of at most `most` images to picture."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]] = True
    return chosen
