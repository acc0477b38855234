"""The logs of a run: the progress bar, a line for each epoch, metrics.jsonl, TensorBoard's scalars."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from rcl_fast.train.rundir.result_files import HISTORY
from rcl_fast.train.runtime.files import write_lines

_logger = logging.getLogger(__name__)


class Log(Protocol):
    """What training reports its progress to."""

    def step_ended(
        self, epoch: int, steps_per_epoch: int, losses: dict[str, float], images_per_second: float
    ) -> None: ...

    def epoch_ended(self, history: list[dict[str, Any]], is_best: bool) -> None: ...


class SilentLog:
    """The Log of every process but the main one, which does nothing."""

    def step_ended(self, epoch: int, steps_per_epoch: int, losses: dict[str, float], images_per_second: float) -> None:
        pass

    def epoch_ended(self, history: list[dict[str, Any]], is_best: bool) -> None:
        pass


class RunLog:
    """The Log of the main process: the bar, and files in the run's folder; use it as a context manager.

    `history` has the rows of the epochs done. A stop may have kept the last from being written, or a damaged checkpoint
    may have made them fewer. Raises OSError.
    """

    def __init__(self, folder: Path, epochs: int, history: list[dict[str, Any]]) -> None:
        self._folder = folder
        self._epochs = epochs
        if history or (folder / HISTORY).exists():
            write_lines(folder / HISTORY, history)
        self._tensorboard = SummaryWriter(str(folder), purge_step=len(history) + 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=rich.get_console(),
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, status="")

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._tensorboard.close()

    def step_ended(self, epoch: int, steps_per_epoch: int, losses: dict[str, float], images_per_second: float) -> None:
        """Moves the bar by a step of `epoch` (from 0); `losses` are the epoch's means so far."""
        task = self._progress.tasks[0]
        if task.total is None:
            self._progress.reset(self._task, total=(self._epochs - epoch) * steps_per_epoch)
        shown = "  ".join(f"{name.replace('_', '-')} {value:.3f}" for name, value in losses.items())
        self._progress.update(
            self._task,
            advance=1,
            description=f"epoch {epoch + 1}/{self._epochs}",
            status=f"{shown}  {images_per_second:,.0f} img/s",
        )

    def epoch_ended(self, history: list[dict[str, Any]], is_best: bool) -> None:
        """Writes the last row of the history to the log, metrics.jsonl and TensorBoard."""
        row = history[-1]
        groups = "  ".join(f"{name} {row[name]:.1%}" for name in ("many", "medium", "few") if row[name] is not None)
        _logger.info(
            f"epoch {row['epoch']:>3}/{self._epochs}  loss {row['loss']:.3f}  "
            f"balanced {row['balanced_accuracy']:.1%}  {groups}  {row['images_per_second']:,.0f} img/s"
            + (f" ({row['waiting_for_data']:.0%} of the time in the loader)" if row["waiting_for_data"] > 0.1 else "")
            + ("  best" if is_best else "")
        )
        write_lines(self._folder / HISTORY, history)
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self._tensorboard.add_scalar(name, value, row["epoch"])
        self._tensorboard.flush()
