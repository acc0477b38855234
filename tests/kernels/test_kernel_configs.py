"""The table of block sizes, and what the compiler made of it (bench/results/aot.csv)."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcl_fast.kernels import configs
from rcl_fast.kernels.table import TABLE

BENCH = Path(__file__).parents[2] / "bench"
COLUMNS = ("kernel", "arch", "kind", "width", "rows", "keys", "depth", "warps", "stages")


@pytest.fixture
def tiny_tiles() -> None:
    """Overrides the fixture of that name: the table's own tiles."""


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, str]]:
    return _rows((BENCH / "results" / "aot.csv").read_text(encoding="utf-8"))


def test_every_kernel_architecture_kind_and_width_has_an_entry() -> None:
    for arch in configs.ARCHITECTURES:
        for kind in configs.kinds(arch):
            for kernel in configs.WIDTHS:
                for width in (8, 16, 64, 100, 128, 256, 300, 1024, 2048):
                    if kernel != "backward" or configs.in_registers(arch, kind, width):
                        for rows, keys in ((1, 1), (512, 612), (131072, 132072)):
                            assert isinstance(configs.choose(kernel, arch, kind, width, rows, keys), configs.Config)


def test_backward_keeps_whole_rows() -> None:
    """Its gradient is one tile wide: a depth below the width would drop features without a word."""
    for (kernel, _, _, width), sizes in TABLE.items():
        if kernel == "backward":
            assert all(configs.Config(*size).depth >= width for size in sizes)


def test_small_problems_get_small_tiles() -> None:
    sizes = [configs.Config(*size) for size in TABLE["forward", 90, "half", 128]]
    assert configs.choose("forward", 90, "half", 128, 131072, 132072) == sizes[0]
    assert configs.choose("forward", 90, "half", 128, 512, 612) == sizes[-1]


def test_matmul_precision_decides_the_kind() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, kind in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert configs.kind_of(torch.float32, 90) == kind
            assert configs.kind_of(torch.float32, 75) == "ieee"
            assert configs.kind_of(torch.bfloat16, 90) == "half"
    finally:
        torch.set_float32_matmul_precision(before)


def test_compiled_table_covers_the_shipped_one(compiled: list[dict[str, str]]) -> None:
    found = {tuple(row[name] for name in COLUMNS) for row in compiled}
    shipped = {tuple(map(str, (*entry, *size))) for entry, sizes in TABLE.items() for size in sizes}
    assert shipped <= found, f"run bench/aot.py: {sorted(shipped - found)[:3]} were never compiled"


def test_compiled_table_has_no_spill_and_fits(compiled: list[dict[str, str]]) -> None:
    for row in compiled:
        assert not row["error"], row
        assert row["stack"] == row["local"] == "0", f"spills: {row}"
        assert int(row["shared"]) <= int(row["shared_limit"]), f"too much shared memory: {row}"


def _uses_tensor_cores(row: dict[str, str]) -> bool:
    return any(int(row[instruction]) for instruction in ("wgmma", "mma", "tcgen05"))


def test_compiled_table_has_tensor_core_products(compiled: list[dict[str, str]]) -> None:
    """16-bit and TF32 products from sm_80 on; before, Triton has none, and exact float32 has none anywhere."""
    for row in compiled:
        if row["kernel"] in ("forward", "backward", "weights"):
            expected = int(row["arch"]) >= 80 and row["kind"] != "ieee"
            assert _uses_tensor_cores(row) == expected, row


@pytest.mark.parametrize(
    "part",
    [
        ["--arch", "90", "--kernel", "backward", "--kind", "half", "--width", "128"],
        ["--arch", "80", "--kernel", "forward", "--kind", "tf32", "--width", "64"],
        ["--arch", "100", "--kernel", "weights", "--kind", "half"],
    ],
    ids=lambda part: f"sm_{part[1]} {part[3]}",
)
def test_compiling_again_keeps_the_tables_claims(
    part: list[str], compiled: list[dict[str, str]], tmp_path: Path
) -> None:
    """A few entries from source, in a process without the interpreter; registers may differ with the version."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, str(BENCH / "aot.py"), *part, "--processes", "1"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again = _rows(done.stdout)
    wanted = dict(zip(("arch", "kernel", "kind", "width"), part[1::2], strict=False))
    assert len(again) == sum(all(row[name] == value for name, value in wanted.items()) for row in compiled)
    assert all(map(_uses_tensor_cores, again))
