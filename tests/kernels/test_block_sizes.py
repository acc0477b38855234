"""The table of block sizes, and what the compiler made of it (bench/results/speed/aot.csv)."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from batches import assert_as_exact_as_plain, loss_and_gradients, random_batch
from torch.torch_version import TorchVersion

from rcl_fast.backends import triton as backend
from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.block_size_table import TABLE
from rcl_fast.kernels.pack import PACK_ROWS

ROOT = Path(__file__).parents[2]
COLUMNS = ("kernel", "arch", "kind", "width", *block_sizes.BlockSizes._fields)
H100 = block_sizes.Processor(90, 132)


@pytest.fixture
def tiny_tiles() -> None:
    """Overrides the fixture of that name: the table's own tiles."""


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, str]]:
    return _rows((ROOT / "bench" / "results" / "speed" / "aot.csv").read_text(encoding="utf-8"))


def test_every_kernel_architecture_math_mode_and_width_has_an_entry() -> None:
    for arch, multiprocessors in block_sizes.MULTIPROCESSORS.items():
        device = block_sizes.Processor(arch, multiprocessors)
        for math_mode in block_sizes.math_modes(arch):
            for kernel in block_sizes.WIDTHS:
                for width in (8, 16, 64, 100, 128, 256, 300, 1024, 2048):
                    if kernel != "backward" or block_sizes.in_registers(device, math_mode, width):
                        for rows, keys in ((1, 1), (512, 612), (131072, 132072)):
                            sizes, grid = block_sizes.choose(kernel, device, math_mode, width, rows, keys)
                            assert sizes in block_sizes.candidates(kernel, arch, math_mode, width)
                            assert grid.splits * grid.tiles_per_split >= grid.tiles == -(-keys // sizes.keys)


def test_backward_keeps_whole_rows() -> None:
    """Its gradient is one tile wide: a depth below the width would drop features without a word."""
    for (kernel, _, _, width), sizes in TABLE.items():
        if kernel == "backward":
            assert all(block_sizes.BlockSizes(*size).depth >= width for size in sizes)


def test_tiles_divide_what_rows_are_padded_to() -> None:
    """No load or store of a tile has a mask: a longer side would read and write past the packed rows."""
    sides = {side for sizes in TABLE.values() for size in sizes for side in size[:2]} | {PACK_ROWS}
    assert all(block_sizes.ALIGNMENT % side == 0 for side in sides)


def test_a_grid_has_no_more_programs_than_an_axis_takes() -> None:
    for arch, multiprocessors in block_sizes.MULTIPROCESSORS.items():
        device = block_sizes.Processor(arch, multiprocessors)
        for keys in (128 * 65_535, 2**23 + 128, 10**7 // 128 * 128, 3 * 2**24):
            end = 0
            for sizes, grid, first_key in block_sizes.launches("dlogits", device, "half", 512, 256, keys):
                assert first_key == end
                assert first_key % block_sizes.ALIGNMENT == 0
                assert grid.splits <= 65_535
                end += grid.tiles * sizes.keys
            assert end == keys


def test_small_problems_get_small_tiles() -> None:
    sizes = [block_sizes.BlockSizes(*size) for size in TABLE["forward", 90, "half", 128]]
    assert block_sizes.choose("forward", H100, "half", 128, 131072, 132072)[0] == sizes[0]
    assert block_sizes.choose("forward", H100, "half", 128, 512, 612)[0] == sizes[-1]


def test_a_limit_of_registers_is_an_option_only_where_it_is_set() -> None:
    assert block_sizes.BlockSizes(64, 32, 16, 4, 3, 1).options == {"num_warps": 4, "num_stages": 3}
    assert block_sizes.BlockSizes(64, 32, 16, 4, 3, 1, 128).options == {"num_warps": 4, "num_stages": 3, "maxnreg": 128}


@pytest.mark.parametrize("D", [40, 72], ids=["in registers", "through the workspace"])
def test_a_limit_of_registers_changes_no_result(D: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()

    def tiles(limit: int | None) -> None:
        def candidates(kernel: str, *_: object) -> tuple[block_sizes.BlockSizes, ...]:
            taken.add((kernel, limit))
            return (block_sizes.BlockSizes(16, 32, 64 if kernel == "backward" else 16, 4, 1, 1, limit),)

        monkeypatch.setattr(block_sizes, "candidates", candidates)

    monkeypatch.setattr(block_sizes, "REGISTER_WIDTH", dict.fromkeys(block_sizes.MATH_MODES, 64))
    batch = random_batch(device, 20, 7, D)
    tiles(None)
    free = loss_and_gradients(backend.losses, batch)
    tiles(128)
    limited = loss_and_gradients(backend.losses, batch)
    assert taken == {
        (kernel, limit) for kernel in ("forward", "backward" if D == 40 else "dlogits") for limit in (None, 128)
    }
    if device.type == "cpu":  # compiled, the limit might decide how a product and a sum are rounded
        assert all(torch.equal(one, other) for one, other in zip(free, limited, strict=True))
    assert_as_exact_as_plain(batch)


def test_matmul_precision_decides_the_math_mode() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, math_mode in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert block_sizes.math_mode_of(torch.float32, 90) == math_mode
            assert block_sizes.math_mode_of(torch.float32, 75) == "ieee"
            assert block_sizes.math_mode_of(torch.bfloat16, 90) == "half"
    finally:
        torch.set_float32_matmul_precision(before)


def test_compiled_table_covers_the_shipped_one(compiled: list[dict[str, str]]) -> None:
    found = {tuple(row[name] for name in COLUMNS) for row in compiled}
    shipped = {
        tuple("" if number is None else str(number) for number in (*entry, *block_sizes.BlockSizes(*size)))
        for entry, sizes in TABLE.items()
        for size in sizes
    }
    assert shipped <= found, f"run `make aot`: {sorted(shipped - found)[:3]} were never compiled"


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
        if row["kernel"] in ("forward", "backward", "dlogits"):
            expected = int(row["arch"]) >= 80 and row["kind"] != "ieee"
            assert _uses_tensor_cores(row) == expected, row


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        ["--arch", "90", "--kernel", "backward", "--kind", "half", "--width", "128"],
        ["--arch", "80", "--kernel", "forward", "--kind", "tf32", "--width", "64"],
        ["--arch", "100", "--kernel", "dlogits", "--kind", "half"],
    ],
    ids=lambda part: f"sm_{part[1]} {part[3]}",
)
def test_compiling_again_keeps_the_tables_claims(
    part: list[str], compiled: list[dict[str, str]], tmp_path: Path
) -> None:
    """A few entries from source, in a process without the interpreter; registers may differ with the version.

    Triton 3.3 spills 128 bytes a thread in one of them, which costs time alone.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels.aot", *part, "--processes", "1"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    again = _rows(done.stdout)
    if TorchVersion(triton.__version__) < "3.4":
        assert not any(row["error"] for row in again), done.stderr[-2000:]
        assert all(int(row["shared"]) <= int(row["shared_limit"]) for row in again)
        assert all(int(row["stack"]) + int(row["local"]) <= 128 for row in again), "spills much"
    else:
        assert done.returncode == 0, done.stderr[-2000:]
    wanted = dict(zip(("arch", "kernel", "kind", "width"), part[1::2], strict=False))
    assert len(again) == sum(all(row[name] == value for name, value in wanted.items()) for row in compiled)
    assert all(map(_uses_tensor_cores, again))


def test_launches_cover_every_key_once() -> None:
    for arch, multiprocessors in block_sizes.MULTIPROCESSORS.items():
        device = block_sizes.Processor(arch, multiprocessors)
        for rows, keys in ((1, 128), (512, 1536), (512, 8704), (8142, 512), (3000, 128 * 77), (16384, 17408)):
            for kernel in ("forward", "dlogits"):
                end = 0
                for sizes, grid, first_key in block_sizes.launches(kernel, device, "half", 1024, rows, keys):
                    assert first_key == end
                    assert grid.row_blocks * sizes.rows >= rows
                    assert grid.splits * grid.tiles_per_split >= grid.tiles > (grid.splits - 1) * grid.tiles_per_split
                    end += grid.tiles * sizes.keys
                assert end == keys


def test_no_multiprocessor_is_left_with_half_a_round() -> None:
    """The benchmark's iNaturalist batch: 68 tiles of keys for 4 blocks of rows, two for each of 132 and 8 more."""
    for kernel in ("forward", "dlogits"):
        rounds, rest = block_sizes.launches(kernel, H100, "half", 1024, 512, 8704)
        assert rounds.grid.balance(132) == 1
        assert rest.grid.a_multiprocessor(132) == rest.grid.tiles_per_split == 1
    for rows in range(128, 40_000, 640):  # of narrow rows any number has splits that fit; more of them cost too
        for kernel in ("forward", "backward"):
            _, grid = block_sizes.choose(kernel, H100, "half", 128, rows, block_sizes.aligned(rows) + 1024)
            if grid.row_blocks * grid.splits > 132:
                assert grid.balance(132) >= 0.75, (kernel, rows, grid)


def test_splits_of_a_gradient_are_few() -> None:
    """Each is one more gradient of 4 bytes a number."""
    assert block_sizes.choose("backward", H100, "half", 128, 131072, 132096)[1].splits == 1
    assert block_sizes.choose("backward", H100, "half", 128, 16384, 17408)[1].splits <= 2
