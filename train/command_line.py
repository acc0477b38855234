"""What the five commands share: how threads wait, where the log goes, and how an error for people ends the program."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rcl_fast.train.errors import Preempted, UserError


@contextmanager
def command() -> Iterator[None]:
    """Prints the log of what runs inside; an error for people there ends the program with its message alone.

    Raises:
        SystemExit: as `exit_with_message`.
    """
    # OpenMP reads it when PyTorch loads: threads that wait for work then let other processes run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log_to_console()
    with exit_with_message():
        yield


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turns errors for people into an exit with their message, Preempted into one with its status, Ctrl-C into 130."""
    try:
        yield
    except (UserError, OSError) as error:
        message = _for_people(error)
        if message is None:
            raise
        raise SystemExit(message or 1) from error
    except (Preempted, KeyboardInterrupt) as stop:
        raise SystemExit(getattr(stop, "exit_status", 130)) from None  # as shells have it for Ctrl-C


def _for_people(error: UserError | OSError) -> str | None:
    """Returns what a command says of an error; None for one that is a defect.

    Only its first line is not indented: the last such line of a log says what was wrong.
    """
    if isinstance(error, UserError):
        return str(error).replace("\n", "\n  ")
    return None if error.filename is None else f"{error.filename} can't be used: {error.strerror}"


def log_to_console() -> None:
    """Has what is logged under "rcl_fast" printed to the terminal, from INFO on; calling it again changes nothing."""
    logger = logging.getLogger("rcl_fast")
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)


class _ConsoleHandler(logging.Handler):
    """Prints through rich's console, whose progress bars stay below what is printed."""

    def emit(self, record: logging.LogRecord) -> None:
        from rcl_fast.train.runtime.console import print_text  # loads rich, only where something is said

        print_text(self.format(record))
