"""A second stage on a finished run: a new classifier, tested and reported as the run was."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from rcl_fast import metrics
from rcl_fast.heads import CosineClassifier
from rcl_fast.train.arguments import ranges
from rcl_fast.train.arguments.ranges import flag
from rcl_fast.train.checks import check_results_folder
from rcl_fast.train.config import saved_config
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.errors import NonFiniteLoss, UserError, refuse
from rcl_fast.train.inference import best_checkpoint, load_network
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch
from rcl_fast.train.loop.evaluation import count, evaluate, random_mask
from rcl_fast.train.loop.resuming import check_class_counts
from rcl_fast.train.network.decoupled import ScaledClassifier, tau_normalized
from rcl_fast.train.network.models import LongTailedClassifier, build_classifier
from rcl_fast.train.network.optimization import build_schedule
from rcl_fast.train.options import Config, OptimizationOptions, SecondStageOptions
from rcl_fast.train.report import results
from rcl_fast.train.report.results import Outcome
from rcl_fast.train.rundir import checkpoints, status, writer
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.hardware import Runtime, choose_runtime

SOURCE_BATCH, SOURCE_RATE = 512, 0.2  # from the authors' cls_crt.yaml and cls_lws.yaml for ImageNet-LT
DEFAULTS = {"epochs": 10, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}  # theirs, where none is given
TAU_STEPS = 21
# The options that only some methods have a use for.
_OF_TRAINING = ("epochs", "lr", "schedule", "momentum", "weight_decay", "seed")
_OF_TAU = ("tau", "tau_steps")
CHUNK = 8192  # features that are classified at once: the logits of many classes take memory

_logger = logging.getLogger(__name__)


def second_stage(options: SecondStageOptions) -> Path:
    """Runs the second stage, tests it and writes the results; returns their folder.

    Raises:
        UserError: what is wrong with the options, the run, its data set or an image.
        NonFiniteLoss: the classifier diverged.
    """
    config = _config(options)
    folder = _folder(options)
    _check_new(folder)
    run = _load(options, config)
    with _claimed(folder):
        return _made(options, run, folder)


def _folder(options: SecondStageOptions) -> Path:
    return options.output or options.run / "second_stage" / options.method


def _check_new(folder: Path) -> None:
    if (folder / results.METRICS).exists():
        raise UserError(f"{folder} already holds results: remove it, or name another folder with --output")


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Makes the folder of the results, and keeps other processes from it. Raises UserError where one was quicker."""
    with checkpoints.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writer.only_writer(folder):
        _check_new(folder)
        yield


def _made(options: SecondStageOptions, run: _FirstStage, folder: Path) -> Path:
    """Makes the second stage on a run that is loaded; returns the folder of the results."""
    _logger.info(f"{options.method} on epoch {run.epoch} of {options.run}; results in {folder}")
    test_loader = build.evaluation_loader(run.config, run.splits.test, run.runtime)
    keep_features = random_mask(len(run.splits.test))
    test = partial(evaluate, run.model, test_loader, run.splits.num_classes, run.runtime, keep_features=keep_features)
    before = test()
    stage = _tau_norm(options, run) if options.method == "tau_norm" else _retrained(options, run)
    run.model.classifier = stage.last
    last = best = test()
    if stage.best is not stage.last:
        run.model.classifier = stage.best
        best = test()
    outcome = Outcome(
        run.config,
        run.splits,
        run.runtime,
        run.model,
        best_epoch=stage.best_epoch,
        last_epoch=stage.last_epoch,
        history=stage.history,
        notes=stage.notes,
    )
    figures_before = metrics.summary(before.confusion, outcome.group_counts, before.reliability)
    figures = results.figures(outcome, best, last, interrupted=False)
    figures["second_stage"] = {
        "method": options.method,
        "run": str(options.run),
        "checkpoint": options.checkpoint,
        "epoch_of_checkpoint": run.epoch,
        "balanced_accuracy_before": figures_before["balanced_accuracy"],
        **stage.facts,
    }
    with checkpoints.writing(folder):
        checkpoints.save(folder / checkpoints.BEST, {"model": run.model.state_dict(), **figures["second_stage"]})
        results.write(outcome, folder, figures, best)
    title = f"test set, {options.method} selected on {run.splits.selected_on}"
    results.show_beside(title, {"before": figures_before, options.method: figures})
    _logger.info(f"report: {folder / results.REPORT}")
    return folder


def _config(options: SecondStageOptions) -> Config:
    """Returns the run's configuration, with the options' changes to it. Raises UserError."""
    if distributed.processes_started() > 1:
        raise UserError("a second stage runs on one process: start it without torchrun")
    _check(options)
    saved = saved_config(options.run)
    _check_classifier(options, saved)
    data, run = saved.data, saved.run
    check_results_folder("--output", _folder(options), None if options.output is None else options.data or data.data)
    batch_size = options.batch_size or saved.optimization.batch_size
    given = {name: value for name in DEFAULTS if (value := getattr(options, name)) is not None}
    return dataclasses.replace(
        saved,
        data=dataclasses.replace(
            data,
            data=options.data or data.data,
            workers=data.workers if options.workers is None else options.workers,
        ),
        run=dataclasses.replace(
            run,
            device=options.device,
            precision=options.precision,
            output=options.output,
            resume=None,
        ),
        optimization=OptimizationOptions(
            batch_size=batch_size,
            lr=options.lr or SOURCE_RATE * batch_size / SOURCE_BATCH,
            **{**DEFAULTS, **given},
        ),
    )


def _check(options: SecondStageOptions) -> None:
    """Raises UserError for options out of their ranges, and for those that the method has no use for."""
    ranges.check(options)
    of_others, others = (_OF_TRAINING, "crt or lws") if options.method == "tau_norm" else (_OF_TAU, "tau_norm")
    unused = [flag(name) for name in of_others if getattr(options, name) is not None]
    refuse(
        {
            f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} for --method {others}": bool(unused),
            "--tau-steps is how many values of tau are tried, and --tau gives the one": (
                options.tau is not None and options.tau_steps is not None
            ),
        }
    )


def _check_classifier(options: SecondStageOptions, saved: Config) -> None:
    """Raises UserError for a classifier that the method can't change."""
    if saved.model.classifier == "cosine" and options.method != "crt":
        raise UserError(
            f"--method {options.method} changes the norms of the classifier's rows, and the cosine classifier of "
            f"{options.run} divides by them (it is tau-normalised with tau 1): only --method crt is there for it"
        )


class _FirstStage(NamedTuple):
    """The run that the second stage builds on; its network is frozen."""

    config: Config
    splits: Splits
    runtime: Runtime
    model: LongTailedClassifier
    epoch: int  # of the checkpoint

    def validation(self) -> Validate:
        """Returns a function: classifier -> its figures on validation. The images' features are computed once, here."""
        num_classes, device = self.splits.num_classes, self.runtime.device
        loader = build.evaluation_loader(self.config, self.splits.validation, self.runtime)
        everything = torch.ones(len(self.splits.validation), dtype=torch.bool)
        evaluation = evaluate(self.model, loader, num_classes, self.runtime, keep_features=everything)
        chunks = list(zip(evaluation.features.split(CHUNK), evaluation.labels.split(CHUNK), strict=True))
        group_counts = torch.as_tensor(self.splits.published_counts)

        def validate(classifier: nn.Module) -> dict[str, Any]:
            counted = [count(classifier, x.to(device), labels.to(device), num_classes) for x, labels in chunks]
            confusion, bins = (torch.stack(of_each).sum(dim=0).cpu() for of_each in zip(*counted, strict=True))
            return metrics.summary(confusion, group_counts, bins)

        return validate


Validate = Callable[[nn.Module], dict[str, Any]]


def _load(options: SecondStageOptions, config: Config) -> _FirstStage:
    """Loads the data set and one of the run's checkpoints. Raises UserError where the two do not belong together."""
    ended = status.now(options.run)
    if ended not in ("finished", "interrupted"):
        raise UserError(f"--run {options.run} is not finished ({ended or 'it has no status.json'}): finish it first")
    runtime = choose_runtime(config.run)
    splits = build.load(config)
    name = best_checkpoint(options.run) if options.checkpoint == "best" else checkpoints.LAST
    loaded = load_network(options.run, name)
    if loaded.class_counts is None or loaded.epoch is None:
        raise UserError(f"{options.run / name} is of an earlier trainer, which did not train like this one")
    if loaded.epoch == 0:
        raise UserError(f"--run {options.run} was stopped in its first epoch: there is no trained network to build on")
    check_class_counts(loaded.class_counts, torch.as_tensor(splits.class_counts))
    model = loaded.model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # stubs
    if config.run.compile:
        model.backbone.compile()
    # The run's seed splits training and validation; the second stage may have its own for everything else.
    seed = config.run.seed if options.seed is None else options.seed
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
    torch.manual_seed(seed)
    return _FirstStage(config, splits, runtime, model.requires_grad_(False).eval(), loaded.epoch)


class _Stage(NamedTuple):
    """The classifiers of the selected and of the last epoch, and a record of how they were made."""

    best: nn.Module
    last: nn.Module
    best_epoch: int
    last_epoch: int
    facts: dict[str, Any]  # for metrics.json
    history: list[dict[str, Any]]
    notes: list[str]


def _tau_norm(options: SecondStageOptions, run: _FirstStage) -> _Stage:
    classifier = run.model.classifier
    assert isinstance(classifier, nn.Linear)
    if options.tau is not None:
        normalised = tau_normalized(classifier, options.tau)
        return _Stage(normalised, normalised, run.epoch, run.epoch, {"tau": options.tau}, [], [])
    validate, steps = run.validation(), options.tau_steps or TAU_STEPS
    tried = {
        tau: validate(tau_normalized(classifier, tau))["balanced_accuracy"]
        for tau in (round(step / (steps - 1), 6) for step in range(steps))
    }
    tau = max(tried, key=lambda tau: tried[tau])  # of equally good ones, the smallest
    note = (
        f"tau {tau:g} was selected on validation, where it reaches {tried[tau]:.1%} of balanced accuracy; tau 0, which "
        f"only leaves the bias out, reaches {tried[0.0]:.1%}, and tau 1 {tried[1.0]:.1%}."
    )
    normalised = tau_normalized(classifier, tau)
    facts = {"tau": tau, "validation_balanced_accuracy": tried}
    return _Stage(normalised, normalised, run.epoch, run.epoch, facts, [], [note])


def _retrained(options: SecondStageOptions, run: _FirstStage) -> _Stage:
    """Trains the classifier by cRT or LWS, each class equally often; the epoch is selected as the run's was."""
    validate = run.validation()
    classifier = _classifier_to_train(options, run)
    parameters = list(classifier.parameters())
    choices = run.config.optimization
    optimizer = SGD(parameters, lr=choices.lr, momentum=choices.momentum, weight_decay=choices.weight_decay)
    schedule = build_schedule(choices, optimizer)
    loader = build.balanced_loader(run.config, run.splits, run.runtime)
    best, best_epoch, best_accuracy = classifier, 0, -1.0
    history: list[dict[str, Any]] = []
    for epoch in range(1, choices.epochs + 1):
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": optimizer.param_groups[0]["lr"]}
        row.update(
            train_classifier_epoch(classifier, run.model.backbone, optimizer, loader.epoch(epoch - 1), run.runtime)
        )
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise NonFiniteLoss(f"the classifier is not finite after epoch {epoch}: a lower --lr often helps")
        row.update(validate(classifier))
        schedule.step()
        history.append(row)
        is_best = row["balanced_accuracy"] > best_accuracy
        if is_best:
            best, best_epoch, best_accuracy = deepcopy(classifier), epoch, row["balanced_accuracy"]
        _logger.info(
            f"epoch {epoch:>3}/{choices.epochs}  loss {row['loss']:.3f}  balanced {row['balanced_accuracy']:.1%}  "
            f"{row['images_per_second']:,.0f} img/s" + ("  best" if is_best else "")
        )
    facts = {"epochs": choices.epochs, "lr": choices.lr, "batch_size": choices.batch_size}
    return _Stage(_merged(best), _merged(classifier), best_epoch, choices.epochs, facts, history, [])


def _classifier_to_train(options: SecondStageOptions, run: _FirstStage) -> nn.Module:
    old = run.model.classifier
    if options.method == "lws":
        assert isinstance(old, nn.Linear)
        return ScaledClassifier(old)
    assert isinstance(old, nn.Linear | CosineClassifier)
    classes, width = old.weight.shape
    return build_classifier(run.config.model, width, classes).to(run.runtime.device)


def _merged(classifier: nn.Module) -> nn.Module:
    """Returns the classifier in the network's own form, so that its checkpoint fits the network of the run."""
    return classifier.merged() if isinstance(classifier, ScaledClassifier) else classifier


def train_classifier_epoch(
    classifier: nn.Module, backbone: nn.Module, optimizer: SGD, batches: Iterator[Batch], runtime: Runtime
) -> dict[str, float]:
    """Trains for one pass over `batches` with cross-entropy; the backbone is in evaluation mode, BatchNorm too.

    Returns the mean loss, images a second, and the share of time spent waiting for the loader.
    """
    backbone.eval()
    began, waiting, images = time.perf_counter(), 0.0, 0
    total = torch.zeros((), device=runtime.device)  # read only once, at the end, so that a GPU never waits
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waiting += time.perf_counter() - asked
        if batch is None:
            break
        if not len(batch.labels):  # each of its images is bad
            continue
        labels = runtime.labels(batch.labels)
        with torch.no_grad(), runtime.autocast():
            features = backbone(runtime.images(batch.views[0])).float()
        loss = F.cross_entropy(classifier(features), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        images += len(labels)
        total += len(labels) * loss.detach()
    if images == 0:
        raise BadImage("there is no image to train the classifier on: every one is bad, and left out")
    mean, seconds = total.item() / images, time.perf_counter() - began
    return {"loss": mean, "images_per_second": images / seconds, "waiting_for_data": waiting / seconds}
