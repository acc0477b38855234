"""status.json: how a run ended, for the script that started it, as torchrun's exit status doesn't tell."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Literal

from rcl_fast.train.rundir import writer
from rcl_fast.train.runtime.files import write_text

FILE = "status.json"
Status = Literal["running", "preempted", "interrupted", "finished", "diverged", "failed"]

_NEXT = {
    "running": "if no process of it is left, it was killed: go on with --resume {folder}",
    "preempted": "a signal stopped it and it saved itself: go on with --resume {folder}",
    "interrupted": "Ctrl-C stopped it: go on with --resume {folder}",
    "finished": "nothing is left to do",
    "diverged": "its loss or weights were no longer finite: start anew, with a lower --lr perhaps",
    "failed": "mend what the error says, then go on with --resume {folder}",
}


def write(folder: Path, status: Status) -> None:
    """Writes the status; of several processes the main one alone is to call it. Raises OSError."""
    content = {"status": status, "next": _NEXT[status].format(folder=folder)}
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> str | None:
    """Returns the status that the run in that folder wrote; None where there is none to read."""
    try:
        status = json.loads((folder / FILE).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return status if isinstance(status, str) else None


def now(folder: Path) -> str | None:
    """Returns the status, but "killed" for a run that wrote "running" and whose folder no process writes to."""
    written = read(folder)
    return "killed" if written == "running" and writer.is_free(folder) else written


def write_if_possible(folder: Path, status: Status) -> None:
    """Writes the status, but ignores an OSError: the disk may be what failed."""
    with suppress(OSError):
        write(folder, status)
