"""How well classes part in feature space: Calinski-Harabasz (higher is better) and Davies-Bouldin (lower)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from rcl_fast.train.experiments.features import Features, of_test_images
from rcl_fast.train.experiments.rows import CLUSTERS
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.runtime.files import write_text


def measure(run: Path, data: Path | None) -> None:
    """Write run/clusters.json: the indices of backbone and head, of the best epoch and of the last."""
    found = {}
    for prefix, checkpoint in (("", best_checkpoint(run)), ("last_epoch_", checkpoints.LAST)):
        features = of_test_images(run, checkpoint, data)
        found.update({prefix + name: value for name, value in of_features(features).items()})
    write_text(run / CLUSTERS, json.dumps(found, indent=2) + "\n")


def best_checkpoint(run: Path) -> str:
    """A best epoch that is also the last may have no file of its own."""
    return checkpoints.BEST if (run / checkpoints.BEST).is_file() else checkpoints.LAST


def of_features(features: Features) -> dict[str, float]:
    found = {f"backbone_{name}": value for name, value in indices(features.backbone, features.labels).items()}
    if features.head is not None:
        found.update({f"head_{name}": value for name, value in indices(features.head, features.labels).items()})
    return found


def indices(features: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """Both indices of features [n, d], each class a cluster; they need two classes and more images than classes."""
    return {
        "calinski_harabasz": float(calinski_harabasz_score(features, labels)),
        "davies_bouldin": float(davies_bouldin_score(features, labels)),
    }
