"""A finished run as one row: its figures, its options, and the machine that it ran on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcl_fast.train.experiments import runs
from rcl_fast.train.experiments.job_queue import LOG, PROVENANCE
from rcl_fast.train.experiments.setting import MAKES_IMBALANCE
from rcl_fast.train.report.results import METRICS

CLUSTERS = "clusters.json"

_KEPT = (
    *("balanced_accuracy", "harmonic_mean", "geometric_mean", "many", "medium", "few", "worst_class"),
    *("classes_at_zero", "expected_calibration_error", "best_epoch", "last_epoch"),
    *("last_epoch_balanced_accuracy", "last_epoch_harmonic_mean", "selected_on", "parameters", "images_per_second"),
    *("loader", "device", "processes", "precision"),
)
_GROUPS = re.compile(r"(\d+) of \d+ classes are under [^;]*; (\d+) others")


def row_of(of: runs.Run, second_stage: str | None = None) -> dict[str, Any] | None:
    """Returns a finished run's figures, options and machine; None where it is not finished."""
    if runs.state(of) != "finished":
        return None
    results = runs.read_json(of.folder / METRICS)
    if second_stage is not None:
        results = runs.read_json(runs.second_stage_folder(of, second_stage) / METRICS)
        if not results:
            return None
    return {
        "key": of.id,
        "second_stage": second_stage,
        "dataset": of.config.data.dataset,
        "imbalance": of.config.data.imbalance if of.config.data.dataset in MAKES_IMBALANCE else None,
        "loss": of.config.loss.loss,
        "seed": of.config.run.seed,
        "epochs": of.config.optimization.epochs,
        **{name: results.get(name) for name in _KEPT},
        **_groups(of.folder),
        **runs.read_json(of.folder / CLUSTERS),
        "arguments": shlex.join(of.arguments),
        **_provenance(of.folder if second_stage is None else runs.second_stage_folder(of, second_stage)),
    }


def _groups(folder: Path) -> dict[str, int]:
    """Returns how many classes the compression rule found failing, and how many not, from the run's log."""
    log = folder / LOG
    counts = _GROUPS.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    if not counts:
        return {}
    failing, others = map(int, counts[-1])
    return {"failing_classes": failing, "other_classes": others}


def _provenance(folder: Path) -> dict[str, Any]:
    """Returns the provenance of the run's last start, with the commits of all its starts."""
    starts: Sequence[dict[str, Any]] = runs.read_json(folder / PROVENANCE).get("starts", [])
    if not starts:
        return {"commit": "not recorded: not started by reproduce.py"}
    return {**starts[-1], "commit": ", ".join(dict.fromkeys(start["commit"] for start in starts))}
