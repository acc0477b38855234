"""What the compiler made of the kernels must not get worse unseen: bench/results/speed/aot.csv, and cost_model.csv."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.kernels import aot, cost_model

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, str]]

AGAIN = (  # kernel, width, bounded; the large tile of each: what the benchmark's large cases launch, and a ragged one
    ("forward", "128", "True"),
    ("forward", "128", "False"),
    ("backward", "128", "True"),
    ("backward", "128", "False"),
)
MORE = 1.05  # instructions an element, against the committed ones
BALANCE = 0.85  # of a grid of more than one wave


@pytest.fixture(scope="module")
def compiled() -> Rows:
    return aot.read()


@pytest.fixture(scope="module")
def predicted() -> Rows:
    return aot.read(cost_model.RESULTS)


def test_rows_are_of_these_kernels(compiled: Rows) -> None:
    assert {row["sources"] for row in compiled} == {aot.sources()}, (
        "a file of kernels/ that has kernels has changed since bench/results/speed/aot.csv was written: run `make aot`"
    )


def test_every_product_was_counted(compiled: Rows) -> None:
    for row in compiled:
        counted = float(row["per_element"] or 0)
        assert (counted > 0) == (row["kernel"] in aot.PRODUCTS), row
        if counted:
            config = aot.case_of(row).config
            a_tile = float(row["trips"]) * int(row["trip"]) + int(row["beside"])
            assert counted == pytest.approx(a_tile * 32 * config.warps / (config.rows * config.keys), abs=1e-3)


def test_the_table_says_how_many_programs_a_multiprocessor_holds(compiled: Rows) -> None:
    """`block_sizes.choose` reckons with it; of the common variant, the first of `aot.cases_of`."""
    wrong = [
        row
        for row in compiled
        if row["kernel"] in aot.PRODUCTS and row["bounded"] == "True" and row["programs"] != row["resident"]
    ]
    assert not wrong, f"{len(wrong)} entries of kernels/block_size_table.py, the first: {wrong[0]}"


def test_predictions_are_of_these_rows(compiled: Rows, predicted: Rows) -> None:
    assert predicted == cost_model.predictions(compiled), (
        "launches or counts have changed since bench/results/speed/cost_model.csv was written: "
        "run python -m bench.kernels.cost_model"
    )


def test_no_multiprocessor_waits_long_for_the_fullest(predicted: Rows) -> None:
    poor = [row for row in predicted if row["waves"] and float(row["waves"]) > 1 and float(row["balance"]) < BALANCE]
    assert not poor, "\n".join(f"{row['case']}, {row['kernel']}: {row['balance']}" for row in poor)


def compiled_again(rows: Rows, folder: Path) -> Rows:
    """Compiles the cases of these rows from source, in a process without the interpreter, and returns its rows."""
    wanted = folder / "rows.csv"
    with wanted.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels.aot", "--rows", str(wanted), "--processes", "1"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(csv.DictReader(done.stdout.splitlines()))


def test_compiling_again_counts_no_more(compiled: Rows, tmp_path: Path) -> None:
    """Exit status 0 says that nothing spills, and that shared memory suffices."""
    if {row["triton"] for row in compiled} != {triton.__version__}:
        pytest.skip(f"the rows are of Triton {compiled[0]['triton']}, and {triton.__version__} makes other code")
    of_sm_90 = {(row["kernel"], row["width"], row["bounded"]): row for row in reversed(compiled) if _is_of_sm_90(row)}
    before = [of_sm_90[wanted] for wanted in AGAIN]
    for old, new in zip(before, compiled_again(before, tmp_path), strict=True):
        assert aot.case_of(old) == aot.case_of(new)
        assert float(new["per_element"]) <= MORE * float(old["per_element"]), (old, new)
        assert int(new["resident"]) >= int(old["resident"]), (old, new)


def _is_of_sm_90(row: dict[str, str]) -> bool:
    return row["arch"] == "90" and row["kind"] == "half"
