"""Train a long-tailed classifier: `python train/run.py --help`."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rcl_fast import metrics
from rcl_fast.train import checkpoints, config, engine, loading
from rcl_fast.train.config import Config
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.loader import Loader, StateMismatch
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.engine import NonFiniteLoss, Training
from rcl_fast.train.evaluation import Evaluation, evaluate, some_of
from rcl_fast.train.logs import RunLog, write_text
from rcl_fast.train.machine import choose_machine
from rcl_fast.train.report import Report, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: parse, train, report."""
    run(config.parse(arguments))


def run(settings: Config) -> Path:
    """Train, test the best and the last epoch, write metrics.json and report.html; returns the folder of results."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("training on several processes is not built yet: run train/run.py without torchrun")
    console = Console(soft_wrap=True)
    say = partial(console.print, highlight=False, markup=False)
    machine = choose_machine(settings.run)
    splits = loading.load(settings, say)
    settings = loading.with_loader(settings, splits, machine, say)
    training = engine.start(settings, splits, machine)
    if settings.run.resume is not None:
        training.load_state_dict(checkpoints.load(settings.run.resume / checkpoints.LAST))
    loaders = (
        loading.training_loader(settings, splits, machine, say),
        loading.evaluation_loader(settings, splits.validation, machine, say),
    )
    folder = _prepare_folder(settings)
    _introduce(console, settings, splits, training, folder)

    interrupted = False
    with RunLog(folder, settings.optimization.epochs, training.epoch, console) as log:
        try:
            engine.fit(training, *loaders, folder, log)
        except KeyboardInterrupt:
            interrupted = True
            training.load_state_dict(checkpoints.load(folder / checkpoints.LAST))  # as the last whole epoch left it
            log.say(f"interrupted; writing the report of {training.epoch} epochs (Ctrl-C again leaves without it)")
        except StateMismatch as error:
            raise SystemExit(f"--resume {folder}: {error}") from error
        except (NonFiniteLoss, BadImage) as error:
            raise SystemExit(f"{error}\nThe last good checkpoint is {folder / checkpoints.LAST}") from error
    try:
        test = loading.evaluation_loader(settings, splits.test, machine, say)
        results, evaluation = _results(settings, splits, training, test, folder, interrupted)
        _write_results(settings, splits, training, folder, results, evaluation)
    except KeyboardInterrupt:
        raise SystemExit(f"left without a report; --resume {folder} makes it") from None
    except BadImage as error:
        raise SystemExit(f"{error}\nTraining is done: mend this, then --resume {folder} tests and reports") from error
    _conclude(console, results, folder)
    return folder


def _prepare_folder(settings: Config) -> Path:
    """Make the folder of the results and write the resolved configuration there; never write over another run."""
    folder = settings.run.output
    if folder is not None and (folder / checkpoints.LAST).exists() and settings.run.resume is None:
        raise SystemExit(f"--output {folder} already holds a run: go on with --resume {folder}, or name another folder")
    try:
        if folder is None:
            folder = _new_folder(settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(settings.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"the results can't be written ({error}); choose another folder with --output") from error
    return folder


def _new_folder(settings: Config) -> Path:
    """runs/DATASET-LOSS-ARCH-TIME, with a number where another run of this second has it."""
    name = f"{settings.data.dataset}-{settings.loss.loss}-{settings.model.arch}".replace("/", "-")
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def _introduce(console: Console, settings: Config, splits: Splits, training: Training, folder: Path) -> None:
    counts = splits.class_counts
    device = training.machine.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(
        f"{settings.data.dataset}: {len(splits.train):,} training images of {splits.num_classes} classes "
        f"({counts.max():,} down to {counts.min():,} a class), {len(splits.validation):,} to validate on, "
        f"{len(splits.test):,} to test on; the best epoch is selected on {splits.selected_on}\n"
        f"{settings.model.arch}: {_parameters(training.model.backbone, training.model.classifier):,} parameters, "
        f"{_parameters(training.model):,} with the heads; {where}, {training.machine.precision}; loss "
        f"{settings.loss.loss}, {settings.optimization.epochs} epochs\n"
        f"results in {folder}"
        + (f"; going on after epoch {training.epoch}" if settings.run.resume is not None else ""),
        highlight=False,
        markup=False,
    )


def _parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _results(
    settings: Config, splits: Splits, training: Training, test: Loader, folder: Path, interrupted: bool
) -> tuple[dict[str, Any], Evaluation]:
    """The content of metrics.json, and the best epoch's evaluation on the test set."""
    last = _test_checkpoint(training, test, folder / checkpoints.LAST, len(splits.test))
    best = last
    if 0 < training.best_epoch < training.epoch:
        best = _test_checkpoint(training, test, folder / checkpoints.BEST, len(splits.test))
    class_accuracy = metrics.per_class_accuracy(best.confusion)
    results = {
        **metrics.summary(best.confusion, training.group_counts),
        "per_class_accuracy": [None if value != value else value for value in class_accuracy.tolist()],
        "best_epoch": training.best_epoch or None,
        "last_epoch": training.epoch,
        "last_epoch_balanced_accuracy": metrics.summary(last.confusion, training.group_counts)["balanced_accuracy"],
        "selected_on": splits.selected_on,
        "parameters": _parameters(training.model.backbone, training.model.classifier),
        "parameters_with_heads": _parameters(training.model),
        "images_per_second": _median([row["images_per_second"] for row in training.history]),
        "loader": settings.data.loader,
        "waiting_for_data": _median([row["waiting_for_data"] for row in training.history]),
        "interrupted": interrupted,
        "device": training.machine.device.type,
        "precision": training.machine.precision,
        "seed": settings.run.seed,
        "loss": settings.loss.loss,
    }
    return results, best


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _test_checkpoint(training: Training, test: Loader, path: Path, count: int) -> Evaluation:
    training.model.load_state_dict(checkpoints.load(path)["model"])
    return evaluate(training.model, test, len(training.class_counts), training.machine, pictured=some_of(count))


def _write_results(
    settings: Config,
    splits: Splits,
    training: Training,
    folder: Path,
    results: dict[str, Any],
    evaluation: Evaluation,
) -> None:
    write_text(folder / "metrics.json", json.dumps(results, indent=2) + "\n")
    write_report(
        folder / "report.html",
        Report(
            title=f"{settings.data.dataset} · {settings.loss.loss} · {settings.model.arch}",
            config=settings.to_dict(),
            metrics=results,
            history=training.history,
            class_names=splits.class_names,
            class_counts=training.group_counts.tolist(),
            confusion=evaluation.confusion.numpy(),
            embeddings=evaluation.features.numpy(),
            embedding_labels=evaluation.labels.numpy(),
            notes=training.notes,
        ),
    )


def _conclude(console: Console, results: dict[str, Any], folder: Path) -> None:
    which = f"epoch {results['best_epoch']}, selected on {results['selected_on']}"
    table = Table(title=f"test set, {which if results['best_epoch'] else 'untrained'}")
    shown = {
        "balanced accuracy": results["balanced_accuracy"],
        "harmonic mean": results["harmonic_mean"],
        "many (> 100 images)": results["many"],
        "medium (20 to 100)": results["medium"],
        "few (< 20)": results["few"],
        "worst class": results["worst_class"],
        f"balanced accuracy, last epoch ({results['last_epoch']})": results["last_epoch_balanced_accuracy"],
    }
    table.add_column("")
    table.add_column("accuracy", justify="right")
    for name, value in shown.items():
        table.add_row(name, "–" if value is None else f"{value:.1%}")
    console.print(table)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)


if __name__ == "__main__":
    main(sys.argv[1:])
