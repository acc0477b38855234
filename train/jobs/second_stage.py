"""A second stage on a finished run: its classifier anew, tested and reported as the run was."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from rcl_fast import metrics
from rcl_fast.heads import CosineClassifier
from rcl_fast.train import config
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch
from rcl_fast.train.loop.evaluation import Evaluation, count, evaluate, some_of
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.network.decoupled import Method, ScaledClassifier, tau_normalized
from rcl_fast.train.network.models import build_classifier
from rcl_fast.train.network.optimization import build_schedule
from rcl_fast.train.options import Config, OptimizationOptions
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoints, status
from rcl_fast.train.runtime.machine import Machine, choose_machine

SOURCE_BATCH, SOURCE_RATE = 512, 0.2  # of the authors' cls_crt.yaml and cls_lws.yaml for ImageNet-LT
CHUNK = 8192  # features that are classified at once: logits of many classes take room


@dataclass(frozen=True)
class Options:
    """Which run, and what becomes of its classifier."""

    run: Path
    """Folder of a finished run, like runs/NAME. Its configuration, data set and loader are used."""
    method: Method
    """crt: the classifier anew. tau_norm: its rows by their norm to the power tau. lws: a learnt factor a class."""
    checkpoint: Literal["best", "last"] = "best"
    """Which of the run's: of the epoch that it selected, or of its last."""
    tau: float | None = None
    """tau_norm: the power. None: the one of 0, 1 / (tau_steps - 1), ..., 1 that is best on validation."""
    tau_steps: int = 21
    """tau_norm: how many values of tau are tried."""
    epochs: int = 10
    """crt, lws: passes over as many images as the training set has (section 5.1 of the paper: 10)."""
    lr: float | None = None
    """crt, lws: learning rate at its highest. None: the authors' 0.2 for 512 images a step, in proportion."""
    batch_size: int | None = None
    """crt, lws: images a step. None: the run's."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """crt, lws: per epoch, a cosine to 0 (the authors'), or times 0.1 at 80 and 90 % of the epochs."""
    momentum: float = 0.9
    """crt, lws: momentum of SGD (the authors')."""
    weight_decay: float = 5e-4
    """crt, lws: weight decay, of the classifier or of the factors (the authors')."""
    seed: int | None = None
    """Of cRT's new weights, the order and the augmentation. None: the run's."""
    output: Path | None = None
    """Folder of the results. None: RUN/second_stage/METHOD."""
    data: Path | None = None
    """Folder that holds the data set, where it has moved. None: the run's."""
    workers: int | None = None
    """As for train/run.py. None: the run's."""
    device: str = "auto"
    """As for train/run.py."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the backbone, as for train/run.py; the classifier is trained in fp32."""


def second_stage(options: Options) -> Path:
    """Make the second stage, test it, write the results; returns their folder. Raises SystemExit with what is wrong."""
    settings = _settings(options)
    folder = options.output or options.run / "second_stage" / options.method
    if (folder / results.METRICS).exists():
        raise SystemExit(f"{folder} already holds results: remove it, or name another folder with --output")
    console = Console(soft_wrap=True)
    say = partial(console.print, highlight=False, markup=False)
    try:
        _second_stage(options, settings, folder, console, say)
    except BadImage as error:
        raise SystemExit(str(error)) from error
    return folder


def _second_stage(options: Options, settings: Config, folder: Path, console: Console, say: build.Say) -> None:
    splits = build.load(settings, say)
    training = _load(options, settings, splits)
    epoch = training.epoch
    say(f"{options.method} on epoch {epoch} of {options.run}; results in {folder}")
    test = _test(training, settings, splits, say)
    before = test()
    validate = _validation(training, settings, splits, say)
    if options.method == "tau_norm":
        stage = _tau_norm(options, training, validate)
    else:
        stage = _retrained(options, training, splits, validate, say)
    training.model.classifier = stage.last
    last = best = test()
    if stage.best is not stage.last:
        training.model.classifier = stage.best
        best = test()
    was = metrics.summary(before.confusion, training.group_counts, before.reliability)
    found = results.figures(training.config, splits, training, best, last, interrupted=False)
    found["second_stage"] = {
        "method": options.method,
        "run": str(options.run),
        "checkpoint": options.checkpoint,
        "epoch_of_checkpoint": epoch,
        "balanced_accuracy_before": was["balanced_accuracy"],
        **stage.facts,
    }
    with checkpoints.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(folder / checkpoints.BEST, {"model": training.model.state_dict(), **found["second_stage"]})
        results.write(training.config, splits, training, folder, found, best)
    title = f"test set, {options.method} selected on {splits.selected_on}"
    results.show_beside(console, title, {"before": was, options.method: found})
    say(f"report: {folder / results.REPORT}")


def _settings(options: Options) -> Config:
    """The run's configuration, with what the options change of it. Raises SystemExit."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("a second stage runs on one process: start it without torchrun")
    if not (options.run / "config.json").is_file():
        raise SystemExit(
            f"--run {options.run}: no config.json there; give the folder of a finished run, like runs/NAME"
        )
    saved = config.saved_config(options.run)
    _check(options, saved)
    data, run = saved.data, saved.run
    batch_size = options.batch_size or saved.optimization.batch_size
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
            epochs=options.epochs,
            batch_size=batch_size,
            lr=options.lr or SOURCE_RATE * batch_size / SOURCE_BATCH,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            schedule=options.schedule,
        ),
    )


def _check(options: Options, saved: Config) -> None:
    """Raises SystemExit for values that no type can rule out, and for a classifier that the method can't serve."""
    if saved.model.classifier == "cosine" and options.method != "crt":
        raise SystemExit(
            f"--method {options.method} changes the norms of the classifier's rows, and the cosine classifier of "
            f"{options.run} divides by them (it is tau-normalised with tau 1): only --method crt is there for it"
        )
    problems = {
        "--tau must be a finite number": options.tau is not None and not math.isfinite(options.tau),
        "--tau-steps must be at least 2": options.tau_steps < 2,
        "--epochs must be at least 1": options.epochs < 1,
        "--lr must be above 0": options.lr is not None and options.lr <= 0,
        "--batch-size must be at least 2": options.batch_size is not None and options.batch_size < 2,
        "--tau is for --method tau_norm": options.tau is not None and options.method != "tau_norm",
    }
    if any(problems.values()):
        raise SystemExit("\n".join(message for message, wrong in problems.items() if wrong))


def _load(options: Options, settings: Config, splits: Splits) -> Training:
    """The run as its checkpoint has it, with nothing trainable. Raises SystemExit."""
    became = status.read(options.run)
    if became not in ("finished", "interrupted"):
        raise SystemExit(f"--run {options.run} is not finished ({became or 'it has no status.json'}): finish it first")
    training = start_training(settings, splits, choose_machine(settings.run))
    best = options.run / checkpoints.BEST
    take_best = options.checkpoint == "best" and best.exists()  # interrupted early, a run has none
    state = checkpoints.load(best) if take_best else checkpoints.last_epoch(options.run).state
    training.check(state)
    training.model.load_state_dict(state["model"])
    training.model.requires_grad_(False).eval()
    training.epoch = training.best_epoch = state["epoch"]
    # The run's seed parts training and validation; the second stage may have its own for everything else.
    seed = settings.run.seed if options.seed is None else options.seed
    training.config = dataclasses.replace(settings, run=dataclasses.replace(settings.run, seed=seed))
    torch.manual_seed(seed)
    return training


def _test(training: Training, settings: Config, splits: Splits, say: build.Say) -> Callable[[], Evaluation]:
    """Evaluates the network as it is when called."""
    loader = build.evaluation_loader(settings, splits.test, training.machine, say)
    pictured = some_of(len(splits.test))
    return lambda: evaluate(training.model, loader, splits.num_classes, training.machine, pictured=pictured)


Validate = Callable[[nn.Module], dict[str, Any]]


def _validation(training: Training, settings: Config, splits: Splits, say: build.Say) -> Validate:
    """Classifier -> its figures on the validation images, whose features are computed once."""
    loader = build.evaluation_loader(settings, splits.validation, training.machine, say)
    everything = torch.ones(len(splits.validation), dtype=torch.bool)
    found = evaluate(training.model, loader, splits.num_classes, training.machine, pictured=everything)
    parts = list(zip(found.features.split(CHUNK), found.labels.split(CHUNK), strict=True))
    device = training.machine.device

    def validate(classifier: nn.Module) -> dict[str, Any]:
        counted = [count(classifier, x.to(device), labels.to(device), splits.num_classes) for x, labels in parts]
        confusion, bins = (torch.stack(part).sum(dim=0).cpu() for part in zip(*counted, strict=True))
        return metrics.summary(confusion, training.group_counts, bins)

    return validate


class _Stage(NamedTuple):
    """The classifiers of the selected and of the last epoch, and what metrics.json says of how they came about."""

    best: nn.Module
    last: nn.Module
    facts: dict[str, Any]


def _tau_norm(options: Options, training: Training, validate: Validate) -> _Stage:
    classifier = training.model.classifier
    assert isinstance(classifier, nn.Linear)
    if options.tau is not None:
        normalized = tau_normalized(classifier, options.tau)
        return _Stage(normalized, normalized, {"tau": options.tau})
    tried = {
        tau: validate(tau_normalized(classifier, tau))["balanced_accuracy"]
        for tau in (round(step / (options.tau_steps - 1), 6) for step in range(options.tau_steps))
    }
    tau = max(tried, key=lambda tau: tried[tau])  # the smallest of those that are as good
    training.notes.append(
        f"tau {tau:g} was selected on validation, where it reaches {tried[tau]:.1%} of balanced accuracy; tau 0, which "
        f"only leaves the bias out, reaches {tried[0.0]:.1%}, and tau 1 {tried[1.0]:.1%}."
    )
    normalized = tau_normalized(classifier, tau)
    return _Stage(normalized, normalized, {"tau": tau, "validation_balanced_accuracy": tried})


def _retrained(options: Options, training: Training, splits: Splits, validate: Validate, say: build.Say) -> _Stage:
    """cRT and LWS: trained on every class equally often, and the epoch selected as the run selected its own."""
    settings, model = training.config, training.model
    classifier = _classifier_to_train(options, training)
    parameters = list(classifier.parameters())
    choices = settings.optimization
    optimizer = SGD(parameters, lr=choices.lr, momentum=choices.momentum, weight_decay=choices.weight_decay)
    schedule = build_schedule(choices, optimizer)
    loader = build.balanced_loader(settings, splits, training.machine, say)
    training.best_epoch, best, best_accuracy = 0, classifier, -1.0
    for epoch in range(1, choices.epochs + 1):
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": optimizer.param_groups[0]["lr"]}
        row.update(train_epoch(classifier, model.backbone, optimizer, loader.epoch(epoch - 1), training.machine))
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise SystemExit(f"the classifier is not finite after epoch {epoch}: a lower --lr often helps")
        row.update(validate(classifier))
        schedule.step()
        training.history.append(row)
        is_best = row["balanced_accuracy"] > best_accuracy
        if is_best:
            training.best_epoch, best_accuracy = epoch, row["balanced_accuracy"]
            best = deepcopy(classifier)
        say(
            f"epoch {epoch:>3}/{choices.epochs}  loss {row['loss']:.3f}  balanced {row['balanced_accuracy']:.1%}  "
            f"{row['images_per_second']:,.0f} img/s" + ("  best" if is_best else "")
        )
    training.epoch = choices.epochs
    facts = {"epochs": choices.epochs, "lr": choices.lr, "batch_size": choices.batch_size}
    return _Stage(_finished(best), _finished(classifier), facts)


def _classifier_to_train(options: Options, training: Training) -> nn.Module:
    old = training.model.classifier
    if options.method == "lws":
        assert isinstance(old, nn.Linear)
        return ScaledClassifier(old)
    assert isinstance(old, nn.Linear | CosineClassifier)
    classes, width = old.weight.shape
    return build_classifier(training.config.model, width, classes).to(training.machine.device)


def _finished(classifier: nn.Module) -> nn.Module:
    """As the network has it, so that its checkpoint fits the network of the run."""
    return classifier.merged() if isinstance(classifier, ScaledClassifier) else classifier


def train_epoch(
    classifier: nn.Module, backbone: nn.Module, optimizer: SGD, batches: Iterator[Batch], machine: Machine
) -> dict[str, float]:
    """One pass of cross-entropy over `batches`; the backbone is as in evaluation, BatchNorm's statistics too.

    Returns the mean loss, images a second, and the share of time in which the loader was waited for.
    """
    backbone.eval()
    began, waiting, images = time.perf_counter(), 0.0, 0
    total = torch.zeros((), device=machine.device)  # read once, at the end: a GPU then never waits
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waiting += time.perf_counter() - asked
        if batch is None:
            break
        labels = machine.labels(batch["label"])
        with torch.no_grad(), machine.autocast():
            features = backbone(machine.images(batch["x1"])).float()
        loss = F.cross_entropy(classifier(features), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        images += len(labels)
        total += len(labels) * loss.detach()
    mean, seconds = total.item() / max(images, 1), time.perf_counter() - began
    return {"loss": mean, "images_per_second": images / seconds, "waiting_for_data": waiting / seconds}
