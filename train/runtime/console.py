"""What is printed to the terminal: text and tables, below which a progress bar may run."""

from __future__ import annotations

import rich
from rich.table import Table


def print_text(text: str) -> None:
    """Prints what may name files: no markup is read in it, and names that are no UTF-8 don't stop it."""
    readable = text.encode(errors="replace").decode()
    rich.get_console().print(readable, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table; one that is too wide is not cut off."""
    rich.get_console().print(table, soft_wrap=True)
