"""One writer for each folder: a run does not go on where another process may still be at it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rcl_fast.train.errors import UserError

LOCK = ".writer"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, at most as long as this process lives. Raises UserError where another process holds it.

    The lock is of a kind that loaders' processes do not inherit, and that network file systems keep for all nodes.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is writing to {folder}: wait until it ends, or end it, then go on with "
                f"--resume {folder}; nothing was written"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
