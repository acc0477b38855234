"""How well classes separate in feature space: Calinski-Harabasz (higher is better) and Davies-Bouldin (lower)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from rcl_fast.train.experiments.features import Features, features_of_test_images
from rcl_fast.train.experiments.rows import CLUSTERS
from rcl_fast.train.inference import best_checkpoint
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.runtime.files import write_text


def measure(run: Path, data: Path | None) -> None:
    """Writes run/clusters.json: the indices of backbone and head, for the best epoch and for the last."""
    values = {}
    for prefix, checkpoint in (("", best_checkpoint(run)), ("last_epoch_", checkpoints.LAST)):
        features = features_of_test_images(run, checkpoint, data)
        values.update({prefix + name: value for name, value in of_features(features).items()})
    write_text(run / CLUSTERS, json.dumps(values, indent=2) + "\n")


def of_features(features: Features) -> dict[str, float]:
    values = {f"backbone_{name}": value for name, value in indices(features.backbone, features.labels).items()}
    if features.head is not None:
        values.update({f"head_{name}": value for name, value in indices(features.head, features.labels).items()})
    return values


def indices(features: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """Returns both indices of features [n, d], with each class as a cluster. They need 2 <= classes < images."""
    return {
        "calinski_harabasz": float(calinski_harabasz_score(features, labels)),
        "davies_bouldin": float(davies_bouldin_score(features, labels)),
    }
