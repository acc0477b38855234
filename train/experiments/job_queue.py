"""Runs as separate processes: a queue over the devices of this machine, and a progress bar."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rcl_fast.provenance import describe
from rcl_fast.train.errors import Preempted, UserError
from rcl_fast.train.experiments.devices import visible_devices
from rcl_fast.train.rundir import status
from rcl_fast.train.rundir.result_files import HISTORY, read_json
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.files import write_text
from rcl_fast.train.runtime.threads import usable_cpus
from rcl_fast.train.runtime.wording import counted

_logger = logging.getLogger(__name__)

LOG, PROVENANCE = "output.log", "provenance.json"
_LOCK = ".lock"
_POLL_SECONDS = 0.2


class Job(NamedTuple):
    """A process to run to its end, in a folder that no other process may write to meanwhile."""

    label: str
    command: list[str]
    folder: Path
    epochs: int  # how many lines the folder's metrics.jsonl will have; 0: there is no progress to show


class Failure(NamedTuple):
    """A job that gave no result, and why."""

    job: Job
    why: str


def without_job(label: str, folder: Path, why: str) -> Failure:
    """Returns the failure of what was to be in a folder, and no process is started for."""
    return Failure(Job(label, [], folder, epochs=0), why)


class Stopped(Preempted):
    """The stop of the queue by a signal; the runs under way have saved themselves."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 130 if number == signal.SIGINT else Preempted.exit_status  # as shells have it for Ctrl-C


Slot = Mapping[str, str]
"""A place for one job at a time, as the environment variables of its processes."""


def find_slots(devices: Sequence[str] | None, jobs_per_device: int, devices_per_job: int = 1) -> list[Slot]:
    """Returns the slots of this machine: each device (or group of `devices_per_job`) has `jobs_per_device`.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them; None: all. Without any, the CPU is the one device, whose cores
            the jobs share.

    Raises UserError where there are too few devices for one job, and under torchrun.
    """
    if distributed.processes_started() > 1:
        raise UserError("it starts the processes of its runs itself: start it once, without torchrun")
    names = visible_devices() if devices is None else list(devices)
    if not names and devices_per_job == 1:
        threads = max(1, usable_cpus() // jobs_per_device)
        return [{"OMP_NUM_THREADS": str(threads)} if jobs_per_device > 1 else {}] * jobs_per_device
    groups = [names[start : start + devices_per_job] for start in range(0, len(names), devices_per_job)]
    whole = [",".join(group) for group in groups if len(group) == devices_per_job]
    if not whole:
        there = counted(names, "GPU") if names else "no GPUs"
        raise UserError(f"--gpus-per-run {devices_per_job}: there {'is' if len(names) == 1 else 'are'} {there} here")
    return [{"CUDA_VISIBLE_DEVICES": group} for _ in range(jobs_per_device) for group in whole]


def run_all(jobs: Iterable[Job | Failure], slots: Sequence[Slot], total: int | None = None) -> list[Failure]:
    """Runs every job, one at a time in each slot; returns those that failed, whose logs are in their folders.

    Args:
        jobs: asked for the next job when a slot is free, so that a job may depend on how earlier ones ended. A job that
            is known to fail comes as its failure.
        total: how many jobs there will be, for the bar; None: not known.

    Raises:
        Stopped: a signal came (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP); the jobs under way got SIGTERM and have ended.
    """
    try:
        return _run_all(jobs, slots, total)
    except Stopped as stopped:
        _logger.info(f"{stopped}; the runs under way have saved themselves: the same command goes on")
        raise


def _run_all(jobs: Iterable[Job | Failure], slots: Sequence[Slot], total: int | None) -> list[Failure]:
    waiting, free, running, failures = iter(jobs), list(slots), list[_Running](), list[Failure]()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=rich.get_console(),
        transient=True,
    )
    with _signals() as received, bar, _terminate_on_exit(running):
        task = bar.add_task("runs", total=total)
        while True:
            if received:
                raise Stopped(received[0])
            while free and (job := next(waiting, None)) is not None:
                started = job if isinstance(job, Failure) else _start_if_possible(job, free[0], bar)
                if isinstance(started, Failure):
                    failures.append(started)
                    bar.advance(task)
                else:
                    running.append(started)
                    del free[0]
            if not running:
                return failures
            time.sleep(_POLL_SECONDS)
            for one in list(running):
                bar.update(one.task, completed=_epochs_done(one.job))
                if one.process.poll() is not None:
                    running.remove(one)
                    free.append(one.slot)
                    failures += _ended(one)
                    bar.remove_task(one.task)
                    bar.advance(task)


def is_taken(folder: Path) -> bool:
    """Returns whether a process is at the job of this folder."""
    try:
        with (folder / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no job was ever started there
        return False
    return False


def log_failures(failures: Sequence[Failure]) -> int:
    """Logs which jobs have no result and why; returns a command's exit status."""
    for failure in failures:
        _logger.info(f"no result: {failure.job.label}: {failure.why}")
    return 1 if failures else 0


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    slot: Slot
    lock: IO[str]
    task: TaskID
    began: float


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Gives the list of signals received. It is read between two polls, so that no signal breaks off a start."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_if_possible(job: Job, slot: Slot, bar: Progress) -> _Running | Failure:
    try:
        return _start(job, slot, bar)
    except BlockingIOError:
        return Failure(job, "another process is at it; its result counts when that has ended")
    except OSError as error:
        return Failure(job, f"it could not be started in {job.folder}: {error}")


def _start(job: Job, slot: Slot, bar: Progress) -> _Running:
    """Starts a job. Raises BlockingIOError where another process has the folder, OSError where it can't be written."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        lock = undo.enter_context((job.folder / _LOCK).open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _note_start(job.folder, slot)
        log = undo.enter_context((job.folder / LOG).open("ab+"))
        _end_last_line(log)
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot},
            # A session of its own: Ctrl-C here must not reach the run, which would end without saving itself.
            start_new_session=True,
            # The run holds the lock, too: where this process is killed, the run goes on, and no other may start there.
            pass_fds=(lock.fileno(),),
        )
        undo.pop_all()
    log.close()
    task = bar.add_task(job.label, total=job.epochs or None)
    return _Running(job, process, slot, lock, task, time.monotonic())


def _note_start(folder: Path, slot: Slot) -> None:
    """Adds a start to the folder's record, as a run itself records neither commit nor machine."""
    file = folder / PROVENANCE
    threads = {"threads": int(slot["OMP_NUM_THREADS"])} if "OMP_NUM_THREADS" in slot else {}
    starts = [*_starts_before(file), {**describe(), **threads}]
    write_text(file, json.dumps({"starts": starts}, indent=2) + "\n")


def _starts_before(file: Path) -> list[dict[str, Any]]:
    """Returns the starts recorded so far; a damaged record is kept under another name."""
    try:
        return read_starts(file)
    except UserError as error:
        aside = file.with_name(file.name + ".damaged")
        os.replace(file, aside)
        _logger.warning(f"{error}: kept as {aside}; the starts in it are not in the new record")
        return []


def read_starts(file: Path) -> list[dict[str, Any]]:
    """Returns commit and machine of each start of a run, [] without a file. Raises UserError where it is damaged."""
    starts = read_json(file).get("starts", [])
    if not isinstance(starts, list) or not all(isinstance(start, dict) and "commit" in start for start in starts):
        raise UserError(f"{file} is damaged (it is no record of starts)")
    return starts


def _end_last_line(log: IO[bytes]) -> None:
    """Ends a line that a killed run has left open, or the next run's first line would be part of it."""
    if log.seek(0, os.SEEK_END) > 0:
        log.seek(-1, os.SEEK_END)
        if log.read(1) != b"\n":
            log.write(b"\n")
            log.flush()


def _epochs_done(job: Job) -> int:
    file = job.folder / HISTORY
    return file.read_bytes().count(b"\n") if job.epochs and file.is_file() else 0


def _ended(one: _Running) -> list[Failure]:
    one.lock.close()
    took = f"{time.monotonic() - one.began:,.0f} s"
    if one.process.returncode == 0:
        _logger.info(f"done in {took}: {one.job.label}")
        return []
    diverged = status.read(one.job.folder) == "diverged"
    reason = "its loss diverged" if diverged else _last_said(one.job.folder / LOG)
    why = f"exit status {one.process.returncode}: {reason}"
    _logger.info(f"failed after {took}: {one.job.label}: {why}")
    return [Failure(one.job, f"{why} (more in {one.job.folder / LOG})")]


def _last_said(log: Path) -> str:
    """Returns the last line that is not indented: the first of an error, whose further lines are."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.rstrip() for line in reversed(lines) if line[:1].strip()), "it said nothing")


@contextmanager
def _terminate_on_exit(running: Sequence[_Running]) -> Iterator[None]:
    """Has the jobs under way save themselves, however the queue ends, and waits for them as long as they take."""
    try:
        yield
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.lock.close()
