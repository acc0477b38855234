"""torchrun --max-restarts: a run that torchrun starts again after a failure goes on in its folder by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from rcl_fast.train.rundir import checkpoint_files
from rcl_fast.train.runtime.files import write_text

FOLDERS = Path("runs/.torchrun")


def arguments(given: Sequence[str]) -> list[str]:
    """Returns the command line, with --resume FOLDER where torchrun has restarted a run that left a checkpoint.

    A run that died before its first checkpoint starts again, in the folder that it had made.
    """
    given = list(given)
    options = {argument.split("=")[0] for argument in given}
    if "--resume" in options or not _restarted():
        return given
    folder = Path(_read()[0])
    if checkpoint_files.exist(folder):
        return [*given, "--resume", str(folder)]
    return given if "--output" in options else [*given, "--output", str(folder)]


def remember(folder: Path) -> None:
    """Records the folder of this torchrun's run; only the main process calls it. Raises OSError."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        FOLDERS.mkdir(parents=True, exist_ok=True)
        write_text(_record(), f"{folder}\n{_agent()}\n")


def forget() -> None:
    """Removes, at a first start, the record of an earlier run with the same id."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "0" and not _restarted():
        _record().unlink(missing_ok=True)


def _restarted() -> bool:
    """Returns whether torchrun has started this run before.

    The count is each node's own. It stays 0 where another node's failure came first and this node only joined it again.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return count is not None and _record().is_file() and (count != "0" or _agent() in _read()[1:])


def _read() -> list[str]:
    """Returns the recorded folder, and the torchrun of the process that recorded it."""
    return _record().read_text(encoding="utf-8").splitlines()


def _agent() -> str:
    """Returns a name of this node's torchrun, with the random part of its log folder: numbers of processes recur."""
    log = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents  # LOG/attempt_0/0/error.json
    return f"{socket.gethostname()}-{os.getppid()} {log[2].name if len(log) > 2 else ''}".strip()


def _record() -> Path:
    """Returns the file named by this run's id, or by torchrun's process: without --rdzv-id every id is "none"."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none").replace("/", "-")
    return FOLDERS / (f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name)
