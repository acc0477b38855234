"""A run's network, loaded from its folder: to classify images, or to go on from it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rcl_fast.train.config import saved_config
from rcl_fast.train.errors import NotFound, UserError
from rcl_fast.train.loop.resuming import check_origin, check_weights
from rcl_fast.train.network.models import LongTailedClassifier, build_network
from rcl_fast.train.options import Config
from rcl_fast.train.report.results import PER_CLASS
from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.views.transforms import View, evaluation_view

_logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What classifies an image: its logits [1, C] are `model.classifier(model.backbone(view(image)[None]))`."""

    model: LongTailedClassifier  # on the CPU, in evaluation mode
    view: View  # Pillow's RGB image -> float32 [3, S, S], as in the run's test
    class_names: list[str]  # [C], in the order of the logits


def load_run(run: Path | str, checkpoint: str = checkpoints.BEST) -> Trained:
    """Loads a network to classify with, from the folder of a finished run or second stage (RUN/second_stage/METHOD).

    Args:
        checkpoint: the file in that folder; by default that of the epoch that was best on validation.

    Raises:
        NotFound: the folder is not that of a run, or the run is not finished.
        UserError: the checkpoint can't be read, or is of another network than config.json describes.
    """
    run = Path(run)
    loaded = load_network(run, checkpoint)
    return Trained(loaded.model, evaluation_view(loaded.config.views), _class_names(run / PER_CLASS))


class Loaded(NamedTuple):
    """A run's network, and what is known of its training."""

    model: LongTailedClassifier  # on the CPU, in evaluation mode
    config: Config  # of the run
    class_counts: Tensor | None  # int64 [C] images it was trained on; None: the checkpoint does not say
    epoch: int | None  # after which the checkpoint was written, from 1; None: the checkpoint does not say


def load_network(run: Path, checkpoint: str) -> Loaded:
    """Loads the network of one of a run's checkpoints, to go on from it. Raises as `load_run`."""
    config = saved_config(run.parent.parent if run.parent.name == "second_stage" else run)
    state = _last_epoch(run) if checkpoint == checkpoints.LAST else checkpoints.load(run / checkpoint)
    weights: dict[str, Any] = state["model"]
    last = weights.get("classifier.weight")
    if not isinstance(last, Tensor) or last.dim() != 2:
        raise UserError(f"{run / checkpoint} is no checkpoint of a run")
    model = build_network(config, len(last))
    try:
        if "of" in state:  # a second stage's checkpoint does not say
            check_origin(state["of"], config, len(last))
        check_weights(weights, model)
    except UserError as error:
        raise UserError(f"{run / checkpoint}: {error}") from error
    model.load_state_dict(weights)
    return Loaded(model.eval(), config, state.get("class_counts"), state.get("epoch"))


def best_checkpoint(run: Path) -> str:
    """Returns the file of a run's best epoch: where that is the last one too, a stop may have left only that one's.

    Raises UserError where the best epoch's weights are not there.
    """
    if (run / checkpoints.BEST).is_file():
        return checkpoints.BEST
    state = _last_epoch(run)
    if state.get("best_epoch") != state.get("epoch"):
        raise UserError(f"{run / checkpoints.BEST}, of the best epoch, {state.get('best_epoch')}, is not there")
    return checkpoints.LAST


def _last_epoch(run: Path) -> dict[str, Any]:
    found = checkpoints.last_epoch(run)
    for path, what in found.damaged.items():
        _logger.warning(f"{path} is damaged ({what}): {found.path.name}, of the epoch before, is taken")
    return found.state


def _class_names(file: Path) -> list[str]:
    if not file.is_file():
        raise NotFound(f"{file} is not there, which names the classes: finish the run with --resume {file.parent}")
    with file.open(encoding="utf-8", newline="") as rows:
        return [row["class"] for row in csv.DictReader(rows)]
