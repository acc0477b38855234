"""A run's network, to classify images with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from rcl_fast.train import config
from rcl_fast.train.network.models import LongTailedClassifier, build_network
from rcl_fast.train.report.results import PER_CLASS
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.views.transforms import View, evaluation_view


class Trained(NamedTuple):
    """What classifies an image: `model.classifier(model.backbone(view(image)[None]))` are its logits [1, C]."""

    model: LongTailedClassifier  # on the CPU, in evaluation mode
    view: View  # RGB image of Pillow -> float32 [3, S, S], as the run was tested
    class_names: list[str]  # [C], in the order of the logits


def load_run(run: Path, checkpoint: str = checkpoints.BEST) -> Trained:
    """Of a finished run's folder, or of its second stage's (RUN/second_stage/METHOD), by one of its checkpoints.

    Raises SystemExit where the folder is no run's, or the checkpoint can't be read.
    """
    settings = config.saved_config(run.parent.parent if run.parent.name == "second_stage" else run)
    model = build_network(settings, checkpoints.load(run / checkpoint)["model"])
    return Trained(model.eval(), evaluation_view(settings.views), _class_names(run / PER_CLASS))


def _class_names(file: Path) -> list[str]:
    if not file.is_file():
        raise SystemExit(f"{file} is not there, which names the classes: finish the run with --resume {file.parent}")
    with file.open(encoding="utf-8", newline="") as rows:
        return [row["class"] for row in csv.DictReader(rows)]
