"""Errors whose message is for the person who started the program; it imports nothing.

A message says what was wrong, where, what was expected, and how to mend it. Library functions raise these errors, and
only the commands turn them into an exit (`train/command_line.py`).
"""


class UserError(ValueError):
    """What was asked for can't be done. A command prints the message and exits with status 1."""


class NotFound(UserError, FileNotFoundError):
    """A file or folder is not there."""


class NotWritten(UserError, OSError):
    """A file can't be written; what was saved before is as it was."""


class NonFiniteLoss(UserError, ArithmeticError):
    """The loss or the weights became NaN or infinite; the message describes the batch."""


class EndedByMain(UserError):
    """The main process of a run has ended it. It alone says why, so this message is empty."""


class Preempted(Exception):
    """A signal came, and what can be saved has been. A command exits with `exit_status`."""

    exit_status = 75  # EX_TEMPFAIL: the same command goes on


def refuse(problems: dict[str, bool]) -> None:
    """Raises UserError with a line for each message whose condition holds; returns where none does."""
    refuse_each([message for message, holds in problems.items() if holds])


def refuse_each(messages: list[str]) -> None:
    """Raises UserError with a line for each message; returns without one."""
    if messages:
        raise UserError("\n".join(messages))
