"""Figures from the rows that bench/gpu.sh wrote: time and memory of each case, as SVG.

    python -m bench.loss.plot bench/results/speed/H100/*.jsonl        to docs/figures/

Needs matplotlib, which the lock has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
Row = dict[str, Any]


def gpu_rows(files: list[Path]) -> list[Row]:
    """Returns the rows of time and memory that were measured on a GPU, without those of dry runs."""
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    found = (row for row in map(json.loads, lines) if row.get("device") == "cuda" and not row.get("dry_run"))
    return [row for row in found if row.get("part") in ("speed", "memory")]


def time_of(row: Row) -> float | None:
    """Returns the microseconds of a row of time, in a CUDA graph or eager; None for any other row."""
    return row.get("microseconds") if row["part"] == "speed" else None


def memory_of(row: Row) -> float | None:
    return row.get("both_mb") if row["part"] == "memory" else None


def bars(rows: list[Row], value_of: Callable[[Row], float | None], label: str, file: Path) -> bool:
    """Plots a group of bars for each case, on a logarithmic scale; returns False where no row has the value."""
    from matplotlib.figure import Figure

    values = {
        (row["case"], name_of(row)): value
        for row in rows
        if (value := value_of(row)) and row["case"] != "limits"  # the last row of several runs counts
    }
    if not values:
        return False
    cases, names = (list(dict.fromkeys(key[position] for key in values)) for position in (0, 1))
    figure = Figure(figsize=(2 + 1.6 * len(cases), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(names)
    for position, name in enumerate(names):
        places = [index for index, case in enumerate(cases) if (case, name) in values]
        axes.bar(
            [index + (position - (len(names) - 1) / 2) * width for index in places],
            [values[cases[index], name] for index in places],
            width,
            label=name,
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    machine = rows[-1]
    axes.set_title(f"{machine['gpu']}, {machine['dtype']}, PyTorch {machine['torch']}, {machine['commit']}", fontsize=9)
    axes.legend(fontsize=8, ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return True


def name_of(row: Row) -> str:
    regime = row.get("regime")
    return f"{row['variant']} ({regime})" if regime and not row["variant"].startswith("limit") else row["variant"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args(arguments)
    rows = gpu_rows(options.rows)
    if not rows:
        print("no row of these files was measured on a GPU: there is nothing to draw; bench/gpu.sh makes such rows")
        return 1
    for name, value_of, label in (
        ("time", time_of, "microseconds, forward and backward"),
        ("memory", memory_of, "MB above inputs, forward and backward"),
    ):
        file = options.figures / f"loss_{name}.svg"
        print(f"{file}" if bars(rows, value_of, label, file) else f"{name}: no row has it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
