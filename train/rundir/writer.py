"""One writer for each folder: a run does not go on where another process may still be at it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rcl_fast.train.errors import NotWritten, UserError

LOCK = ".writer"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, at most as long as this process lives.

    The lock is of a kind that loaders' processes do not inherit, and that network file systems keep for all nodes.

    Raises:
        UserError: another process holds it.
        NotWritten: its file can't be made.
    """
    try:
        opened = (folder / LOCK).open("a")
    except OSError as error:
        raise NotWritten(f"nothing can be written to {folder} ({error})") from error
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is writing to {folder}: wait until it ends, or end it, then start again; nothing was "
                "written"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def is_free(folder: Path) -> bool:
    """Returns whether the folder has a lock and no process holds it; False where that can't be known.

    The process that holds the lock must not ask: to close the file gives up its lock.
    """
    try:
        with (folder / LOCK).open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, there is no lock (an earlier trainer had none), or a file system without locks
        return False
    return True
