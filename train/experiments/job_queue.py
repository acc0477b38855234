"""Runs as processes of their own, a queue over the devices of this machine, and a bar that shows where they are."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rcl_fast.provenance import describe
from rcl_fast.train.experiments.rows import PROVENANCE
from rcl_fast.train.runtime.files import write_text
from rcl_fast.train.runtime.threads import usable_cpus

LOG = "output.log"
_POLL_SECONDS = 0.2


class Job(NamedTuple):
    """A process to run to its end, in a folder that no other process is to write to meanwhile."""

    label: str
    command: list[str]
    folder: Path
    epochs: int  # that the folder's metrics.jsonl will have; 0: it tells no progress


class Failure(NamedTuple):
    """A job that did not end well, and why."""

    job: Job
    why: str


class Stopped(Exception):
    """A signal stopped the queue, and the runs under way have saved themselves."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


Slot = Mapping[str, str]
"""The environment variables of a place where one job runs at a time."""


def slots(devices: Sequence[str] | None, jobs_per_device: int, devices_per_job: int = 1) -> list[Slot]:
    """The places of this machine: each device (or group of so many) takes `jobs_per_device` at once.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them; None: all that there are. Without any, the CPU is the one device,
            whose cores the jobs share.

    Raises SystemExit where there are too few devices for one job.
    """
    found = _devices() if devices is None else list(devices)
    if not found:
        threads = max(1, usable_cpus() // jobs_per_device)
        return [{"OMP_NUM_THREADS": str(threads)} if jobs_per_device > 1 else {}] * jobs_per_device
    groups = [found[start : start + devices_per_job] for start in range(0, len(found), devices_per_job)]
    whole = [",".join(group) for group in groups if len(group) == devices_per_job]
    if not whole:
        raise SystemExit(f"--gpus-per-run {devices_per_job}: this machine shows {len(found)} GPUs")
    return [{"CUDA_VISIBLE_DEVICES": group} for _ in range(jobs_per_device) for group in whole]


def _devices() -> list[str]:
    """Those that this process may use, by the names that its children know them by."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def run_all(jobs: Sequence[Job], places: Sequence[Slot], console: Console) -> list[Failure]:
    """Run every job, one a place at a time; returns those that failed, whose logs are in their folders.

    Raises:
        Stopped: a signal came (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP); the jobs under way got SIGTERM and have ended.
    """
    if not jobs:
        return []
    waiting, free, running, failures = deque(jobs), list(places), list[_Running](), list[Failure]()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with _signals() as received, bar, _none_left(running):
        total = bar.add_task("runs", total=len(jobs))
        while waiting or running:
            if received:
                raise Stopped(received[0])
            while waiting and free:
                job = waiting.popleft()
                try:
                    running.append(_start(job, free[0], bar))
                    del free[0]
                except OSError as error:
                    failures.append(Failure(job, _why_not_started(job, error)))
                    bar.advance(total)
            time.sleep(_POLL_SECONDS)
            for one in list(running):
                bar.update(one.task, completed=_epochs_done(one.job))
                if one.process.poll() is not None:
                    running.remove(one)
                    free.append(one.slot)
                    failures += _ended(one, console)
                    bar.remove_task(one.task)
                    bar.advance(total)
    return failures


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    slot: Slot
    lock: IO[str]
    task: TaskID
    began: float


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that came: they stop the queue between two polls, never within a start."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(job: Job, slot: Slot, bar: Progress) -> _Running:
    """Raises BlockingIOError where another process has the folder, OSError where it can't be written to."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        lock = undo.enter_context((job.folder / ".lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _note_start(job.folder, slot)
        log = undo.enter_context((job.folder / LOG).open("ab"))
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot},
            # A session of its own: Ctrl-C here must not reach it as one, which would end it instead of saving it.
            start_new_session=True,
            # The lock is its own, too: where this process is killed, the run goes on, and none is to start beside it.
            pass_fds=(lock.fileno(),),
        )
        undo.pop_all()
    log.close()
    task = bar.add_task(job.label, total=job.epochs or None)
    return _Running(job, process, slot, lock, task, time.monotonic())


def _why_not_started(job: Job, error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "another process is at it; its result counts when that has ended"
    return f"it could not be started in {job.folder}: {error}"


def _note_start(folder: Path, slot: Slot) -> None:
    """The run itself records neither commit nor machine."""
    file = folder / PROVENANCE
    starts = json.loads(file.read_text(encoding="utf-8"))["starts"] if file.is_file() else []
    threads = {"threads": int(slot["OMP_NUM_THREADS"])} if "OMP_NUM_THREADS" in slot else {}
    write_text(file, json.dumps({"starts": [*starts, {**describe(), **threads}]}, indent=2) + "\n")


def _epochs_done(job: Job) -> int:
    file = job.folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if job.epochs and file.is_file() else 0


def _ended(one: _Running, console: Console) -> list[Failure]:
    one.lock.close()
    took = f"{time.monotonic() - one.began:,.0f} s"
    if one.process.returncode == 0:
        console.print(f"done in {took}: {one.job.label}", highlight=False, markup=False)
        return []
    why = f"exit status {one.process.returncode}: {_last_line(one.job.folder / LOG)}"
    console.print(f"failed after {took}: {one.job.label}: {why}", highlight=False, markup=False, soft_wrap=True)
    return [Failure(one.job, f"{why} (more in {one.job.folder / LOG})")]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


@contextmanager
def _none_left(running: Sequence[_Running]) -> Iterator[None]:
    """However the queue ends: ask those under way to save themselves, then wait, as long as they take."""
    try:
        yield
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.lock.close()
