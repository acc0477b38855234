"""A run from its configuration to its results: data, network, epochs, test, report."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from rcl_fast.train import config
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Loader, StateMismatch
from rcl_fast.train.loaders.device import DeviceLoader
from rcl_fast.train.loop import cuda_graph, engine
from rcl_fast.train.loop.evaluation import Evaluation, evaluate, some_of
from rcl_fast.train.loop.loss_readback import NonFiniteLoss
from rcl_fast.train.loop.step import Step
from rcl_fast.train.loop.training import Training, resume_training, start_training
from rcl_fast.train.options import Config
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoints, restarts, status
from rcl_fast.train.rundir.logs import RunLog, SilentLog
from rcl_fast.train.runtime import distributed, signals
from rcl_fast.train.runtime.files import write_text
from rcl_fast.train.runtime.machine import Machine, choose_machine
from rcl_fast.train.runtime.signals import Preempted


def run(settings: Config) -> Path:
    """Train, test the best and the last epoch, write metrics.json and report.html; returns the folder of results.

    Under torchrun every process calls it, and the main one prints and writes.
    """
    machine = choose_machine(settings.run)
    with distributed.joined(machine.device, settings.run.timeout_minutes), signals.listening() as stopping:
        try:
            return _run(distributed.from_main(settings), machine, stopping)
        except SystemExit as error:
            if distributed.world() > 1 and isinstance(error.code, str):
                raise SystemExit(f"process {distributed.rank()} of {distributed.world()}: {error.code}") from error
            raise


def _run(settings: Config, machine: Machine, stopping: Callable[[], bool]) -> Path:
    config.check_shared(settings, distributed.world())
    console = Console(soft_wrap=True, quiet=not distributed.is_main())
    say = partial(console.print, highlight=False, markup=False)
    splits = build.load(settings, say)
    settings = distributed.from_main(build.with_loader(settings, splits, machine, say))
    if settings.run.cuda_graph:
        cuda_graph.check(settings, machine)
    training = start_training(settings, splits, machine)
    say_anywhere = partial(Console(soft_wrap=True).print, highlight=False, markup=False)  # each finds its bad images
    training_loader = build.training_loader(settings, splits, machine, say_anywhere)
    step: Step | None = None
    if settings.run.cuda_graph:
        assert isinstance(training_loader, DeviceLoader)  # checked above
        step = cuda_graph.WholeStep(training_loader)
        training_loader = step.order
    loaders = training_loader, build.evaluation_loader(settings, splits.validation, machine, say_anywhere)
    if settings.run.resume is not None:
        _resume(training, training_loader, settings.run.resume, say)
    folder = distributed.on_main(lambda: _prepare_folder(settings))
    _introduce(console, settings, splits, training, folder)
    try:
        interrupted = _train(settings, training, loaders, folder, console, stopping, step)
        test = build.evaluation_loader(settings, splits.test, machine, say_anywhere)
        best, last = _tested(splits, training, test, folder, stopping)
        figures = results.figures(settings, splits, training, best, last, interrupted)
        if distributed.is_main():
            with checkpoints.writing(folder):
                results.write(settings, splits, training, folder, figures, best)
                status.write(folder, "interrupted" if interrupted else "finished")
    except Preempted:
        with checkpoints.writing(folder):
            status.write(folder, "preempted")
        say(f"stopped by a signal, and saved: go on with --resume {folder}")
        raise SystemExit(os.EX_TEMPFAIL) from None
    except KeyboardInterrupt:
        status.write_if_possible(folder, "interrupted")
        raise SystemExit(f"left without a report; --resume {folder} makes it") from None
    except BadImage as error:
        status.write_if_possible(folder, "failed")
        raise SystemExit(f"{error}\nTraining is done: mend this, then --resume {folder} tests and reports") from error
    except BaseException:
        status.write_if_possible(folder, "failed")
        raise
    results.show(console, figures)
    say(f"report: {folder / results.REPORT}")
    return folder


def _resume(training: Training, training_loader: Loader, folder: Path, say: build.Say) -> None:
    """Go on from the newest checkpoint in the folder, which is written to only where all is well."""
    found = distributed.on_main(lambda: checkpoints.newest(folder))
    try:
        resume_training(training, training_loader, found.state)
    except StateMismatch as error:
        raise SystemExit(
            f"--resume {folder}: {error}. A run goes on with as many processes, and the loader, images and versions "
            "that it began with; nothing was written"
        ) from error
    for path, what in found.damaged.items():
        say(f"{path} is damaged ({what}): going on from the one before, {found.path.name}")
    distributed.on_main(lambda: checkpoints.set_aside(found.damaged))


def _train(
    settings: Config,
    training: Training,
    loaders: tuple[Loader, Loader],
    folder: Path,
    console: Console,
    stopping: Callable[[], bool],
    step: Step | None,
) -> bool:
    """Train to the end; whether Ctrl-C came before it."""
    epochs = settings.optimization.epochs
    main = distributed.is_main()
    with RunLog(folder, epochs, training.epoch, console) if main else nullcontext(SilentLog()) as log:
        try:
            engine.fit(training, *loaders, folder, log, stopping, step)
        except KeyboardInterrupt:
            training.load_state_dict(checkpoints.last_epoch(folder).state)
            log.say(f"interrupted; writing the report of {training.epoch} epochs (Ctrl-C again leaves without it)")
            return True
        except (NonFiniteLoss, BadImage) as error:
            raise SystemExit(f"{error}\nThe last good checkpoint is {folder / checkpoints.LAST}") from error
    return False


def _prepare_folder(settings: Config) -> Path:
    """Make the folder of the results and write the resolved configuration there; never write over another run."""
    folder = settings.run.output
    if folder is not None and checkpoints.exist(folder) and settings.run.resume is None:
        raise SystemExit(f"--output {folder} already holds a run: go on with --resume {folder}, or name another folder")
    try:
        if folder is None:
            folder = _new_folder(settings)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_unfinished(folder)
        write_text(folder / "config.json", json.dumps(settings.to_dict(), indent=2) + "\n")
        status.write(folder, "running")
        restarts.remember(folder)
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
    network = results.parameters(training.model.backbone, training.model.classifier)
    together = f"{distributed.world()} processes, each with " if distributed.world() > 1 else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(
        f"{settings.data.dataset}: {len(splits.train):,} training images of {splits.num_classes} classes "
        f"({counts.max():,} down to {counts.min():,} a class), {len(splits.validation):,} to validate on, "
        f"{len(splits.test):,} to test on; the best epoch is selected on {splits.selected_on}\n"
        f"{settings.model.arch}: {network:,} parameters, "
        f"{results.parameters(training.model):,} with the heads; {together}{where}, {training.machine.precision}; loss "
        f"{settings.loss.loss}, {settings.optimization.epochs} epochs\n"
        f"results in {folder}" + (f"; going on {_position(training)}" if settings.run.resume is not None else ""),
        highlight=False,
        markup=False,
    )


def _position(training: Training) -> str:
    steps = "" if training.progress is None else f" and {training.progress.steps} steps"
    return f"after epoch {training.epoch}{steps}"


def _tested(
    splits: Splits, training: Training, test: Loader, folder: Path, stopping: Callable[[], bool]
) -> tuple[Evaluation, Evaluation]:
    """The best and the last epoch's evaluation on the test set. Raises Preempted."""
    tested = partial(_test_checkpoint, training, test, len(splits.test), stopping)
    best = last = tested(lambda: checkpoints.last_epoch(folder).state["model"])
    if 0 < training.best_epoch < training.epoch:
        best = tested(lambda: checkpoints.load(folder / checkpoints.BEST)["model"])
    return best, last


def _test_checkpoint(
    training: Training,
    test: Loader,
    count: int,
    stopping: Callable[[], bool],
    weights: Callable[[], dict[str, Tensor]],
) -> Evaluation:
    training.model.load_state_dict(distributed.on_main(weights))
    classes = len(training.class_counts)
    return evaluate(training.model, test, classes, training.machine, pictured=some_of(count), stopping=stopping)
