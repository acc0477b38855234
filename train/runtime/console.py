"""What is printed to the terminal: text and tables, below which a progress bar may run."""

from __future__ import annotations

import rich
from rich.table import Table

from rcl_fast.train.runtime.files import printable


def print_text(text: str) -> None:
    """Prints what may name files: no markup is read in it, and names that are no UTF-8 don't stop it."""
    rich.get_console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table; one that is too wide is not cut off."""
    rich.get_console().print(table, soft_wrap=True)
