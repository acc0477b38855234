"""A finished run as one row: its figures, its options, and the machine that it ran on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments import runs
from rcl_fast.train.experiments.job_queue import LOG, PROVENANCE, read_starts
from rcl_fast.train.experiments.setting import MAKES_IMBALANCE
from rcl_fast.train.rundir.result_files import read_json, read_metrics

CLUSTERS = "clusters.json"

_KEPT = (
    *("balanced_accuracy", "harmonic_mean", "geometric_mean", "many", "medium", "few", "worst_class"),
    *("classes_at_zero", "expected_calibration_error", "best_epoch", "last_epoch"),
    *("last_epoch_balanced_accuracy", "last_epoch_harmonic_mean", "selected_on", "parameters", "images_per_second"),
    *("loader", "device", "processes", "precision"),
)
_GROUPS = re.compile(r"(\d+) of \d+ classes are under [^;]*; (\d+) others")


def row_of(of: runs.Run, second_stage: str | None = None) -> dict[str, Any] | None:
    """Returns a finished run's figures, options and machine; None where it is not finished.

    Raises UserError where a file of its is damaged, with its name and what to do.
    """
    why = runs.problem(of)
    if why is not None:
        raise UserError(why)
    if runs.state(of) != "finished":
        return None
    folder = of.folder if second_stage is None else runs.second_stage_folder(of, second_stage)
    try:
        results, indices = read_metrics(folder), read_json(of.folder / CLUSTERS)
    except UserError as error:
        raise UserError(f"{error}: move it away, and the same command makes it anew") from error
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
        **indices,
        "arguments": shlex.join(of.arguments),
        **_provenance(folder),
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
    try:
        starts = read_starts(folder / PROVENANCE)
    except UserError as error:
        return {"commit": f"not known: {error}"}
    if not starts:
        return {"commit": "not recorded: not started by reproduce.py"}
    return {**starts[-1], "commit": ", ".join(dict.fromkeys(start["commit"] for start in starts))}
