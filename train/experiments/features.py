"""The features of a finished run's test images, of its backbone and of its projection head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rcl_fast.train.inference import load_network
from rcl_fast.train.loaders import build
from rcl_fast.train.loop.evaluation import evaluate
from rcl_fast.train.options import Config
from rcl_fast.train.runtime.hardware import Runtime, choose_runtime

CHUNK = 8192  # features that are embedded at once


class Features(NamedTuple):
    """Features float32: [n, d] of the backbone, normalised [n, D] of the head (None: the run has none), labels [n]."""

    backbone: NDArray[np.float32]
    head: NDArray[np.float32] | None
    labels: NDArray[np.int64]
    class_names: list[str]


def features_of_test_images(run: Path, checkpoint: str, data: Path | None) -> Features:
    """Computes the features with the weights in run/checkpoint; `data`: the data set's folder, None: the run's own.

    The caller names the file, as a run of one epoch may have no best checkpoint but the last.
    """
    loaded = load_network(run, checkpoint)
    config = _here(loaded.config, data)
    splits, runtime = build.load(config), choose_runtime(config.run)
    model = loaded.model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # stubs
    everything = torch.ones(len(splits.test), dtype=torch.bool)
    loader = build.evaluation_loader(config, splits.test, runtime)
    evaluation = evaluate(model, loader, splits.num_classes, runtime, keep_features=everything)
    return Features(
        evaluation.features.numpy(),
        None if model.projection_head is None else _embedded(model.projection_head, evaluation.features, runtime),
        evaluation.labels.numpy(),
        splits.class_names,
    )


def _here(config: Config, data: Path | None) -> Config:
    """Returns the configuration for this machine, which need not be the one that trained."""
    folder = config.data.data if data is None else data
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=folder),
        run=dataclasses.replace(config.run, device="auto"),
    )


@torch.no_grad()
def _embedded(head: nn.Module, features: Tensor, runtime: Runtime) -> NDArray[np.float32]:
    """Returns the normalised embeddings [n, D] of features [n, d], float32."""
    embeddings = []
    for chunk in features.split(CHUNK):
        with runtime.autocast():
            of_chunk = head(chunk.to(runtime.device))
        embeddings.append(F.normalize(of_chunk.float(), dim=1).cpu())
    return torch.cat(embeddings).numpy()
