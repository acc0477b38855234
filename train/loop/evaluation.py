"""Evaluation on a set of images: the confusion matrix, the bins of calibration, features for the report's picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rcl_fast.metrics import CALIBRATION_BINS, confusion_matrix, reliability
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.errors import Preempted
from rcl_fast.train.loaders.base import Batch, Loader
from rcl_fast.train.network.models import LongTailedClassifier
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.hardware import Runtime
from rcl_fast.train.runtime.signals import never


class Evaluation(NamedTuple):
    """The result of one pass over the images, on the CPU."""

    confusion: Tensor  # int64 [C, C]
    reliability: Tensor  # float64 [M, 3], `metrics.reliability` of the softmax of the raw logits
    features: Tensor  # float32 [n, d] of the backbone, for the images that `keep_features` selects
    labels: Tensor  # int64 [n] of those images


@torch.no_grad()
def evaluate(
    model: LongTailedClassifier,
    loader: Loader,
    num_classes: int,
    runtime: Runtime,
    keep_features: Tensor | None = None,
    should_stop: Callable[[], bool] = never,
) -> Evaluation:
    """Classifies images by the raw logits, without adjustment, and counts the results of all processes together.

    Each process evaluates its share. The main process gets all features, in the order of the images; the others get
    their own. The network runs uncompiled even where training compiles it, as each batch size would be another graph.

    Args:
        keep_features: bool [n], true for the images whose features are kept; None: for none.
        should_stop: says whether a signal has come.

    Raises:
        Preempted: `should_stop` was true on some process.
        BadImage: no process has had an image.
    """
    model.eval()
    distributed.broadcast_buffers(model)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=runtime.device)
    bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=runtime.device)
    features_kept, labels_kept = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.int64)]
    for batch in _until_all_are_done(loader, should_stop):
        labels = runtime.labels(batch.labels)
        with torch.compiler.set_stance("force_eager"), runtime.autocast():
            features = model.backbone(runtime.images(batch.views[0])).float()
        counted = count(model.classifier, features, labels, num_classes)
        confusion += counted.confusion
        bins += counted.reliability
        if keep_features is not None:
            keep = keep_features[batch.indices]
            features_kept.append(features.cpu()[keep])
            labels_kept.append(batch.labels[keep])
    confusion, bins = distributed.all_reduce(confusion).cpu(), distributed.all_reduce(bins).cpu()
    if not confusion.any():
        raise BadImage(
            "there is no image to evaluate on: every one of its set is bad, and left out. train/verify.py says what is "
            "wrong with them"
        )
    mine = torch.cat(features_kept[1:] or features_kept), torch.cat(labels_kept)
    if keep_features is None:
        return Evaluation(confusion, bins, *mine)
    # A process without images has an empty tensor, without the features' width.
    features_of, labels_of = zip(*distributed.gather_object(mine), strict=True)
    features = torch.cat([f for f in features_of if len(f)] or [mine[0]])
    return Evaluation(confusion, bins, features, torch.cat(labels_of))


class Counted(NamedTuple):
    """The counts of a classifier on some features, as in Evaluation."""

    confusion: Tensor
    reliability: Tensor


@torch.no_grad()
def count(classifier: nn.Module, features: Tensor, labels: Tensor, num_classes: int) -> Counted:
    """Counts the results of a classifier on features float32 [n, d]; with 16 bits, logits would tie."""
    logits = classifier(features)
    return Counted(
        confusion_matrix(labels, logits.argmax(dim=1), num_classes), reliability(logits.softmax(dim=1), labels)
    )


def _until_all_are_done(loader: Loader, should_stop: Callable[[], bool]) -> Iterator[Batch]:
    """Gives this process's batches, then waits until the others have had theirs. Raises Preempted after a signal."""
    batches = loader.epoch(0)
    while True:
        batch = next(batches, None)
        going_on, stopped = distributed.all_reduce_counts(batch is not None, should_stop())
        if stopped:
            raise Preempted
        if not going_on:
            return
        if batch is not None and len(batch.labels):  # else each of its images is bad
            yield batch


def random_mask(count: int, most: int = 5000) -> Tensor:
    """Returns bool [count] with at most `most` entries true: a random choice, the same every time."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]] = True
    return chosen
