"""The features of a finished run's test images, of its backbone and of its projection head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from rcl_fast.train import config
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.loaders import build
from rcl_fast.train.network.models import LongTailedClassifier, build_network
from rcl_fast.train.options import Config
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.runtime.machine import choose_machine


class Features(NamedTuple):
    """float32 [n, d] of the backbone, [n, D] of the head, normalised (None: the run has no head), labels [n]."""

    backbone: NDArray[np.float32]
    head: NDArray[np.float32] | None
    labels: NDArray[np.int64]
    class_names: list[str]


def of_test_images(run: Path, checkpoint: str, data: Path | None) -> Features:
    """By the weights of run/checkpoint; a run of one epoch may have no best but the last: the caller names the file."""
    settings = _settings(run, data)
    splits = build.load(settings, _silent)
    model = build_network(settings, checkpoints.load(run / checkpoint)["model"])
    return _pass(model, settings, splits)


def _settings(run: Path, data: Path | None) -> Config:
    settings = config.saved_config(run)
    where = settings.data.data if data is None else data
    # On the machine at hand, which need not be the one that trained.
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, data=where),
        run=dataclasses.replace(settings.run, device="auto"),
    )


@torch.no_grad()
def _pass(model: LongTailedClassifier, settings: Config, splits: Splits) -> Features:
    machine = choose_machine(settings.run)
    model.to(machine.device, memory_format=machine.memory_format).eval()  # type: ignore[call-overload]  # stubs lag
    backbone, head, labels = [], [], []
    for batch in build.evaluation_loader(settings, splits.test, machine, _silent).epoch(0):
        with machine.autocast():
            features = model.backbone(machine.images(batch["x1"]))
            embeddings = None if model.projection_head is None else model.projection_head(features)
        backbone.append(features.float().cpu())
        labels.append(batch["label"].cpu())
        if embeddings is not None:
            head.append(F.normalize(embeddings.float(), dim=1).cpu())
    return Features(
        torch.cat(backbone).numpy(),
        torch.cat(head).numpy() if head else None,
        torch.cat(labels).numpy(),
        splits.class_names,
    )


def _silent(_: str) -> None:
    pass
