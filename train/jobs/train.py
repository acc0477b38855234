"""A run, from its configuration to its results: data, network, epochs, test, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcl_fast.train.config import check_shared
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.data.manifest import verify_command
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.errors import NonFiniteLoss, Preempted, UserError
from rcl_fast.train.jobs import run_folder
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Loader
from rcl_fast.train.loaders.device import DeviceLoader
from rcl_fast.train.loop import cuda_graph, engine
from rcl_fast.train.loop.evaluation import Evaluation, evaluate, random_mask
from rcl_fast.train.loop.step import Step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.network import ddp
from rcl_fast.train.options import Config
from rcl_fast.train.report import results
from rcl_fast.train.report.results import Outcome
from rcl_fast.train.rundir import checkpoint_files, checkpoints, status
from rcl_fast.train.rundir.logs import Log, RunLog, SilentLog
from rcl_fast.train.runtime import distributed, signals
from rcl_fast.train.runtime.hardware import Runtime, choose_runtime
from rcl_fast.train.runtime.wording import counted

_logger = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]


def run(config: Config) -> Path:
    """Trains, tests the best and the last epoch, writes metrics.json and report.html; returns the folder of results.

    Under torchrun every process calls it, and the main one writes and prints.

    Raises:
        UserError: what is wrong with options, data, checkpoints or disk; under torchrun with the process's number.
        NonFiniteLoss: training diverged.
        Preempted: a signal came, and mid_epoch.pt is written.
    """
    runtime = choose_runtime(config.run)
    with (
        distributed.init_process_group(runtime.device, config.run.timeout_minutes),
        signals.handle_signals() as should_stop,
        _warn_only_off_main(),
    ):
        try:
            return _run(distributed.broadcast_object(config), runtime, should_stop)
        except KeyboardInterrupt:
            raise UserError("interrupted while no epoch was under way: nothing is lost") from None
        except UserError as error:
            if distributed.world_size() > 1 and str(error):
                error.args = (f"process {distributed.rank()} of {distributed.world_size()}: {error}",)
            raise


@contextmanager
def _warn_only_off_main() -> Iterator[None]:
    """Has every process but the main one log only warnings: each would repeat the rest."""
    logger = logging.getLogger("rcl_fast")
    before = logger.level
    if not distributed.is_main():
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run(config: Config, runtime: Runtime, should_stop: ShouldStop) -> Path:
    with ExitStack() as ends:
        job = _prepare(config, runtime, ends)
        with _record_status(job.folder):
            interrupted = _train(job, should_stop)
            best, last = _test(job, should_stop)
            figures = _report(job, best, last, interrupted)
    if distributed.is_main():
        results.show(figures)
    _logger.info(f"report: {job.folder / results.REPORT}")
    return job.folder


class _Job(NamedTuple):
    """A run that is ready to train."""

    config: Config
    splits: Splits
    training: Training
    training_loader: Loader
    validation_loader: Loader
    step: Step | None  # None: train_step
    folder: Path


def _prepare(config: Config, runtime: Runtime, ends: ExitStack) -> _Job:
    """Loads data and network, resumes, and makes the folder of results. Nothing is written there before but its lock.

    Until `ends` is closed, no other run writes there.
    """
    check_shared(config, distributed.world_size())
    ddp.check(config, runtime)
    if config.run.cuda_graph:
        cuda_graph.check(config, runtime)
    distributed.run_on_main(lambda: run_folder.claim(config, ends))
    splits = build.load(config)
    config = distributed.broadcast_object(build.with_loader(config, splits, runtime))
    if config.run.cuda_graph:
        cuda_graph.check(config, runtime)  # again, as the loader that "auto" stands for is known now
    training = start_training(config, splits, runtime)
    training_loader, step = _loader_and_step(config, splits, runtime)
    validation_loader = build.evaluation_loader(config, splits.validation, runtime)
    if config.run.resume is not None:
        run_folder.go_on(training, training_loader, config.run.resume)
    folder = distributed.run_on_main(lambda: run_folder.make(config, ends))
    job = _Job(config, splits, training, training_loader, validation_loader, step, folder)
    _log_start(job)
    return job


def _loader_and_step(config: Config, splits: Splits, runtime: Runtime) -> tuple[Loader, Step | None]:
    loader = build.training_loader(config, splits, runtime)
    if not config.run.cuda_graph:
        return loader, None
    assert isinstance(loader, DeviceLoader)  # cuda_graph.check has checked it
    step = cuda_graph.GraphedStep(loader)
    return step.loader, step


def _log_start(job: _Job) -> None:
    config, splits, training = job.config, job.splits, job.training
    counts, device = splits.class_counts, training.runtime.device
    network = results.parameters(training.model.backbone, training.model.classifier)
    together = f"{distributed.world_size()} processes, each with " if distributed.world_size() > 1 else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    _logger.info(
        f"{config.data.dataset}: {len(splits.train):,} training images of {splits.num_classes} classes "
        f"({counts.max():,} down to {counts.min():,} a class), {len(splits.validation):,} to validate on, "
        f"{len(splits.test):,} to test on; the best epoch is selected on {splits.selected_on}\n"
        f"{config.model.arch}: {network:,} parameters, "
        f"{results.parameters(training.model):,} with the heads; {together}{where}, {training.runtime.precision}; loss "
        f"{config.loss.loss}, {counted(range(config.optimization.epochs), 'epoch')}\n"
        f"results in {job.folder}" + (f"; going on {_progress(training)}" if config.run.resume is not None else "")
    )


def _progress(training: Training) -> str:
    steps = "" if training.progress is None else f" and {counted(range(training.progress.steps), 'step')}"
    return f"after epoch {training.epoch}{steps}"


class _NothingToReport(UserError):
    """Ctrl-C came before the first epoch was done."""


@contextmanager
def _record_status(folder: Path) -> Iterator[None]:
    """Writes status.json where the run ends before its report, and logs how to go on."""
    try:
        yield
    except Preempted:
        if distributed.is_main():
            with checkpoints.writing(folder):
                status.write(folder, "preempted")
        _logger.info(f"stopped by a signal, and saved: go on with --resume {folder}")
        raise
    except KeyboardInterrupt:
        _note(folder, "interrupted")
        raise UserError(f"left without a report; --resume {folder} makes it") from None
    except _NothingToReport:
        _note(folder, "interrupted")
        raise
    except NonFiniteLoss:
        _note(folder, "diverged")
        raise
    except BadImage as error:
        _note(folder, "failed")
        raise UserError(f"{error}\nTraining is done: mend this, then --resume {folder} tests and reports") from error
    except BaseException:
        _note(folder, "failed")
        raise


def _note(folder: Path, what: status.Status) -> None:
    """Writes the status on the main process alone, if the disk, which may be what failed, allows it."""
    if distributed.is_main():
        status.write_if_possible(folder, what)


def _train(job: _Job, should_stop: ShouldStop) -> bool:
    """Trains to the end; returns whether Ctrl-C came before that."""
    training, folder = job.training, job.folder
    with _log(job) as log:
        try:
            engine.fit(training, job.training_loader, job.validation_loader, folder, log, should_stop, job.step)
        except KeyboardInterrupt:
            _go_back(training, folder)
            done = counted(range(training.epoch), "epoch")
            _logger.info(f"interrupted; writing the report of {done} (Ctrl-C again leaves without it)")
            return True
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error}\n{_last_good(training, folder)}") from error
        except BadImage as error:
            raise UserError(f"{error}\n{_advice(job)}{_last_good(training, folder)}") from error
    return False


def _log(job: _Job) -> AbstractContextManager[Log]:
    if not distributed.is_main():
        return nullcontext(SilentLog())
    with checkpoints.writing(job.folder):
        return RunLog(job.folder, job.config.optimization.epochs, job.training.history)


def _go_back(training: Training, folder: Path) -> None:
    """Loads the last whole epoch, which alone is reported. Raises _NothingToReport where there is none."""
    state = checkpoints.last_epoch(folder).state if checkpoint_files.exist(folder) else None
    if state is None or state["epoch"] == 0:
        then = f"--resume {folder} goes on with it" if state is not None else "start again"
        raise _NothingToReport(f"interrupted in the first epoch, so there is nothing to report yet: {then}")
    training.load_state_dict(state)


def _last_good(training: Training, folder: Path) -> str:
    if training.epoch > 0:
        return f"The last good checkpoint is {folder / checkpoints.LAST}"
    if (folder / checkpoints.MID_EPOCH).exists():
        return f"The last good checkpoint is {folder / checkpoints.MID_EPOCH}, within the first epoch"
    return f"No epoch is done, so nothing trained is saved yet: {folder / checkpoints.LAST} is the network at its start"


def _advice(job: _Job) -> str:
    """Returns what to do about a bad image that ended training, as lines; "" where the error has said it."""
    data = job.config.data
    if data.on_bad_image == "skip":
        return ""
    return (
        f"All bad ones are named by: {verify_command(data.dataset, data.data, data.manifest)}\n"
        f"Mend them, then go on with --resume {job.folder}; or start anew with --on-bad-image skip, which leaves them "
        "out\n"
    )


def _test(job: _Job, should_stop: ShouldStop) -> tuple[Evaluation, Evaluation]:
    """Evaluates the best and the last epoch on the test set. Raises Preempted."""
    test_loader = build.evaluation_loader(job.config, job.splits.test, job.training.runtime)
    test = partial(_test_checkpoint, job, test_loader, should_stop)
    best = last = test(lambda: checkpoints.last_epoch(job.folder).state["model"])
    if 0 < job.training.best_epoch < job.training.epoch:
        best = test(lambda: _best_weights(job))
    return best, last


def _best_weights(job: _Job) -> dict[str, Tensor]:
    try:
        return run_folder.best_weights(job.training, job.folder)
    except UserError as error:
        raise UserError(
            f"the weights of the best epoch, {job.training.best_epoch}, are lost: {error}. Put a copy there, and "
            f"--resume {job.folder} tests and reports; or start anew"
        ) from error


def _test_checkpoint(
    job: _Job, test_loader: Loader, should_stop: ShouldStop, weights: Callable[[], dict[str, Tensor]]
) -> Evaluation:
    training = job.training
    training.model.load_state_dict(distributed.run_on_main(weights))
    return evaluate(
        training.model,
        test_loader,
        job.splits.num_classes,
        training.runtime,
        keep_features=random_mask(len(job.splits.test)),
        should_stop=should_stop,
    )


def _report(job: _Job, best: Evaluation, last: Evaluation, interrupted: bool) -> dict[str, Any]:
    """Writes the results and the run's final status; returns the content of metrics.json."""
    training = job.training
    outcome = Outcome(
        job.config,
        job.splits,
        training.runtime,
        training.model,
        best_epoch=training.best_epoch,
        last_epoch=training.epoch,
        history=training.history,
        notes=training.notes,
    )
    figures = results.figures(outcome, best, last, interrupted)
    if distributed.is_main():
        with checkpoints.writing(job.folder):
            results.write(outcome, job.folder, figures, best)
            status.write(job.folder, "interrupted" if interrupted else "finished")
    return figures
