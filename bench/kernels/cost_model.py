"""Predict how long a call's kernels take on an H100, from what the compiler made of them, beside what limits any code.

    python -m bench.kernels.cost_model        # a table, and bench/results/speed/cost_model.csv

Nothing runs: launches come from launches.py, counts from bench/results/speed/aot.csv. Columns are **counted** (grids,
tiles, programs, waves, balance, launches, issue and mufu cycles: instructions over the multiprocessor's rate) or
**estimated** (all other cycles, microseconds, shares). None is measured: bench/loss/gpu.py does that.

A tile has two stages. `elementwise` takes the slower of issue and mufu; `products` the slower of tensor cores, of L2
and, for wide rows, of the steps' own issue. Of the R programs that share a multiprocessor one computes while another
waits, so that 1/R of the shorter stage shows, and of the wait between a product and what needs it:

    cycles of a tile = max(elementwise, products) + min(elementwise, products) / R + WAIT · products of a tile / R

Programs are dealt to the multiprocessors in turn: the one that got most takes ⌈programs / multiprocessors⌉ times a
program's tiles, and what a program does once. Balance is the work over what all could have done in that time. Time to
launch, and the first load of a program, are left out: under some 20 µs a prediction means little.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.kernels import aot
from bench.kernels.counts import Counts, Tile
from bench.kernels.launches import Launch, launches_of
from bench.loss.cases import Case
from bench.loss.gpu import CASES
from rcl_fast.kernels import block_sizes

RESULTS = aot.RESULTS.with_name("cost_model.csv")
ARCH, KIND, BYTES = 90, "half", 2

# An H100 SXM. Rates are a multiprocessor's a cycle (CUDA C++ Programming Guide, "Arithmetic Instructions").
MULTIPROCESSORS = block_sizes.MULTIPROCESSORS[ARCH]
CLOCK = 1.755e9
ISSUES = 4  # instructions of a warp
MUFU = 16  # results
TENSOR = 4096  # 16-bit operations, dense
L2 = 28  # bytes; estimated: 28 to 40 are reported
WAIT = 100  # cycles; estimated: a product's latency and a barrier
# Of the whole chip, a second.
DENSE = 989e12  # operations, as the maker states them at a higher clock
MATMUL = 790e12  # operations that matrix products are expected to reach
MEMORY = 3.35e12  # bytes


class Grid(NamedTuple):
    """How a launch's programs lie on the multiprocessors; all counted."""

    programs: int
    tiles_a_program: int
    tiles: int
    resident: int  # programs that a multiprocessor can hold at once

    @property
    def _dealt(self) -> block_sizes.Grid:
        """The programs as the launching code sees them, here as splits of one block of rows."""
        return block_sizes.Grid(1, self.programs, self.tiles, self.tiles_a_program)

    @property
    def most(self) -> int:
        """Programs that the fullest multiprocessor gets."""
        return self._dealt.a_multiprocessor(MULTIPROCESSORS)

    @property
    def waves(self) -> float:
        return self.programs / (MULTIPROCESSORS * self.resident)

    @property
    def balance(self) -> float:
        return self._dealt.balance(MULTIPROCESSORS)

    @property
    def used(self) -> float:
        """Share of the multiprocessors that get a program."""
        return min(1.0, self.programs / MULTIPROCESSORS)


class TileCycles(NamedTuple):
    """Cycles of one tile on a multiprocessor, by what takes them."""

    issue: float
    mufu: float
    tensor: float
    l2: float
    steps: float  # issue of the product loop, where it stands apart

    def total(self, together: int, products: int) -> float:
        """Returns the cycles of a tile where so many programs share the multiprocessor: the rule above."""
        elementwise = max(self.issue, self.mufu)
        made = max(self.tensor, self.l2, self.steps)
        return max(elementwise, made) + (min(elementwise, made) + WAIT * products) / together


def tile_cycles(counts: Counts, tile: Tile) -> TileCycles:
    """Returns the cycles of a tile. Where the compiler unrolled the steps of wide rows, their issue is elementwise."""
    width = tile.steps * tile.depth
    in_loop = counts.trips * counts.trip
    apart = counts.beside > 0  # else the loop's trip is the whole tile
    lines = tile.keys + (tile.rows if tile.steps > 1 else 0)  # of keys to load; narrow rows keep their own
    written = tile.rows * tile.keys if tile.is_program else 0
    return TileCycles(
        issue=(counts.beside if apart else in_loop) * tile.warps / ISSUES,
        mufu=counts.mufu * 32 * tile.warps / MUFU,
        tensor=2 * tile.products * tile.rows * tile.keys * width / TENSOR,
        l2=BYTES * (lines * width + written) / L2,
        steps=in_loop * tile.warps / ISSUES if apart else 0.0,
    )


def launch_cycles(grid: Grid, cycles: TileCycles, counts: Counts, tile: Tile) -> float:
    """Returns the cycles of the fullest multiprocessor."""
    of_tile = cycles.total(min(grid.resident, grid.most), tile.products)
    return grid.most * (grid.tiles_a_program * of_tile + counts.once * tile.warps / ISSUES)


def compiled_row(launch: Launch, rows: Iterable[Mapping[str, str]]) -> Mapping[str, str]:
    """Returns the row of what a launch takes, in its common variant; raises LookupError if there is none."""
    sizes = {name: launch.arguments[name.upper()] for name in ("rows", "keys", "depth")}
    sizes |= {name: launch.arguments[f"num_{name}"] for name in ("warps", "stages")}
    sizes["maxnreg"] = launch.arguments.get("maxnreg") or ""
    wanted = {"kernel": launch.name, "arch": ARCH, "kind": KIND, "K": launch.arguments["K"], "bounded": True, **sizes}
    for row in rows:
        if all(row[name] == str(value) for name, value in wanted.items()):
            return row
    raise LookupError(f"no row of {wanted}: run `make aot`")


def counted(row: Mapping[str, str]) -> Counts:
    return Counts(**{name: float(row[name]) for name in Counts._fields})  # type: ignore[arg-type]  # whole or not


def kernel_row(launch: Launch, rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """Returns the prediction for one launch of a kernel that makes products."""
    row = compiled_row(launch, rows)
    tile, counts = aot.case_of(row).tile, counted(row)
    grid = Grid(launch.programs, launch.tiles_a_program, launch.tiles, int(row["resident"]))
    cycles = tile_cycles(counts, tile)
    total = launch_cycles(grid, cycles, counts, tile)
    return {
        "kernel": launch.name,
        "tile": f"{tile.rows}×{tile.keys}×{tile.depth}, {tile.warps} warps",
        **grid._asdict(),
        "waves": grid.waves,
        "balance": grid.balance,
        "used": grid.used,
        **{f"{name}_cycles": value for name, value in cycles._asdict().items()},
        "tile_cycles": cycles.total(min(grid.resident, grid.most), tile.products),
        "microseconds": 1e6 * total / CLOCK,
    }


def product_row(launch: Launch) -> dict[str, Any]:
    """Returns the prediction for a matrix product of PyTorch's."""
    rows, inner, columns = launch.arguments["shape"]
    return {"kernel": launch.name, "microseconds": 1e6 * 2 * rows * inner * columns / MATMUL}


def sum_row(name: str, launches: Sequence[Launch], microseconds: float, limits: tuple[float, float]) -> dict[str, Any]:
    """Returns the row of a pass: launches, time, and the two limits, of operations and of bytes from memory."""
    operations, moved = limits
    return {
        "kernel": name,
        "launches": sum(launch.is_ours for launch in launches),
        "launches_torch": sum(not launch.is_ours for launch in launches),
        "microseconds": microseconds,
        "operations_limit": 1e6 * operations / DENSE,
        "bytes_limit": 1e6 * moved / MEMORY,
        "share_of_dense": 1e6 * operations / DENSE / microseconds,
        "share_of_matmul": 1e6 * operations / MATMUL / microseconds,
    }


def case_rows(case: Case, rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Gives the rows of a case: each launch that makes products, then each pass, then both.

    A pass reads the keys once, at the least; the backward pass writes as much.
    """
    N, C, D = case.anchors, case.classes, case.dimensions
    keys = BYTES * (N + C) * D
    forward = 2 * N * (N + C) * D, keys
    limits = {"forward": forward, "backward": (case.operations - forward[0], 2 * keys)}
    found = launches_of(case, ARCH)
    sums = []
    for name, (operations, moved) in limits.items():
        launches = [launch for launch in found if launch.in_backward == (name == "backward")]
        predicted = [
            kernel_row(launch, rows) if launch.is_ours else product_row(launch)
            for launch in launches
            if launch.name in (*aot.PRODUCTS, "aten.mm")
        ]
        for one in predicted:
            yield {"case": case.name, "pass": name, **one}
        sums.append(sum(one["microseconds"] for one in predicted))
        yield {"case": case.name, "pass": name, **sum_row("all", launches, sums[-1], (operations, moved))}
    both = sum_row("all", found, sum(sums), (case.operations, 3 * keys))
    yield {"case": case.name, "pass": "both", **both}


COLUMNS = (
    "case", "pass", "kernel", "tile", "launches", "launches_torch", "programs", "tiles_a_program", "tiles", "resident",
    "waves", "balance", "used", "issue_cycles", "mufu_cycles", "tensor_cycles", "l2_cycles", "steps_cycles",
    "tile_cycles", "microseconds", "operations_limit", "bytes_limit", "share_of_dense", "share_of_matmul",
)  # fmt: skip


def written(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row as the file has it: four digits of a fraction, whole numbers as they are."""
    values = {name: row.get(name, "") for name in COLUMNS}
    return {
        name: f"{float(f'{value:.4g}'):.12g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
    }


def predictions(compiled: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Returns the rows of all of the benchmark's cases."""
    return [written(row) for case in CASES for row in case_rows(case, compiled)]


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Returns the rows as text: of a kernel its grid and tile, of a pass its launches and limits."""
    lines = [
        f"{'case, pass, kernel':44} programs×tiles  waves  balance  used  cycles a tile        µs  share of 989 TF"
    ]
    for row in rows:
        line = f"{row['case'] + ', ' + row['pass'] + ', ' + row['kernel']:44}"
        if row["programs"]:
            grid = f"{row['programs']}×{row['tiles_a_program']}"
            line += f" {grid:>14} {row['waves']:>6} {row['balance']:>8} {row['used']:>5} {row['tile_cycles']:>14}"
        else:
            line += " " * 52
        line += f" {row['microseconds']:>9}"
        if row["launches"]:
            line += f"  {row['share_of_dense']:>6}   {row['launches']} launches + {row['launches_torch']} of PyTorch,"
            line += f" limits {row['operations_limit']} µs (operations), {row['bytes_limit']} µs (bytes)"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", type=Path, default=aot.RESULTS, help="rows of aot.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = predictions(aot.read(options.compiled))
    print(table(rows))
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
