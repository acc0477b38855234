"""Rows of results: JSON lines, each with what it came from.

python -m bench.rows FILE...      says what is wrong with rows, if anything: exit status 1
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rcl_fast import provenance

Row = dict[str, Any]

# What every row says; "gate" is what the tests said on that machine, if bench/gpu.sh ran them there.
REQUIRED = ("date", "commit", "cpu", "gpu", "python", "torch", "triton", "gate")


def describe() -> Row:
    """Returns machine, driver, versions, commit, and what the tests said on this machine before."""
    gate = os.environ.get("RCL_GATE", "not run here")
    return {**provenance.describe(), "cuda": torch.version.cuda, "triton": _triton(), **_driver(), "gate": gate}


def append(file: Path | None, rows: Iterable[Mapping[str, Any]], dry_run: bool = False) -> None:
    """Adds rows to a file, at once, as what comes next may be stopped; None keeps none. Rows of a dry run say so."""
    if file is None:
        return
    about = {**describe(), **({"dry_run": True} if dry_run else {})}
    torn = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")  # a kill left the last line open
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * torn)
        lines.writelines(json.dumps({**row, **about}) + "\n" for row in rows)


def read(file: Path) -> list[Row]:
    """Returns the rows of a file; raises ValueError for a line that is not JSON."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns the median of a figure as NAME, and its 20th and 80th percentiles as NAME_p20 and NAME_p80."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {name: statistics.median(values), f"{name}_p20": fifths[0], f"{name}_p80": fifths[3]}


def problems(file: Path) -> Iterator[str]:
    """Gives what is wrong with a file of rows, a line each."""
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines:
        yield f"{file}: no rows"
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f"{where}: no JSON ({error})"
            continue
        if not isinstance(row, dict):
            yield f"{where}: no row, but {line[:40]!r}"
            continue
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            yield f"{where}: it lacks {', '.join(missing)}"
        if row.get("commit") == "unknown":
            yield f"{where}: of which commit? Outside git, RCL_COMMIT says it"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@cache
def _driver() -> Row:
    """Returns driver, clock and power limit of the first NVIDIA GPU; nothing without one."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(("driver", "clock", "power"), map(str.strip, answer[0].split(",")), strict=False)) if answer else {}


def main(files: list[str]) -> int:
    if not files or files[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    found = [problem for file in files for problem in problems(Path(file))]
    print("\n".join(found) or f"{len(files)} files of rows, all well formed")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
