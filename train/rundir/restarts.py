"""torchrun --max-restarts: started anew after a failure, a run goes on in its folder by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from rcl_fast.train.rundir import checkpoints
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.files import write_text

FOLDERS = Path("runs/.torchrun")


def arguments(given: Sequence[str]) -> list[str]:
    """The command line, with --resume FOLDER where torchrun has restarted a run that left a checkpoint.

    A run that died before its first one starts anew, in the folder it had made.
    """
    given = list(given)
    options = {argument.split("=")[0] for argument in given}
    if "--resume" in options or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not _record().is_file():
        return given
    folder = Path(_record().read_text(encoding="utf-8").strip())
    if checkpoints.exist(folder):
        return [*given, "--resume", str(folder)]
    return given if "--output" in options else [*given, "--output", str(folder)]


def remember(folder: Path) -> None:
    """Note the folder of this torchrun's run, on the main process."""
    if "TORCHELASTIC_RUN_ID" in os.environ and distributed.is_main():
        with checkpoints.writing(FOLDERS):
            FOLDERS.mkdir(parents=True, exist_ok=True)
            write_text(_record(), f"{folder}\n")


def forget() -> None:
    """At a first start: what an earlier run of the same id has noted is not this one's."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "0":
        _record().unlink(missing_ok=True)


def _record() -> Path:
    """Named by the run id; without --rdzv-id that is "none" for every torchrun, and its process tells them apart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none").replace("/", "-")
    return FOLDERS / (f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name)
