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
        SystemExit: the message of a UserError, or Preempted's exit status.
    """
    # OpenMP reads it when PyTorch loads: threads that wait for work then let other processes run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log_to_console()
    with exit_with_message():
        yield


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turns a UserError into an exit with its message, and Preempted into one with its exit status."""
    try:
        yield
    except UserError as error:
        raise SystemExit(str(error) or 1) from error
    except Preempted as stop:
        raise SystemExit(stop.exit_status) from None


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
