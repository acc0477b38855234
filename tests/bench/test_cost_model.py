"""bench/kernels/cost_model.py on numbers worked by hand, and what it takes from the launching code."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernels import cost_model, launches
from bench.kernels.counts import Counts, Tile
from bench.loss.cases import Case
from bench.loss.gpu import CASES
from rcl_fast.kernels.block_sizes import ALIGNMENT

FORWARD = Tile(rows=128, keys=128, depth=128, steps=1, products=1, warps=8, bytes=2, is_program=False)


def counts(**known: float) -> Counts:
    return Counts(**{**dict.fromkeys(Counts._fields, 0), **known})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grid", "most", "waves", "balance", "used"),
    [
        ((136, 2, 272, 1), 2, 136 / 132, 272 / (132 * 2 * 2), 1.0),  # four multiprocessors make the others wait
        ((272, 1, 272, 1), 3, 272 / 132, 272 / (132 * 3), 1.0),
        ((264, 5, 1320, 2), 2, 1.0, 1.0, 1.0),
        ((80, 1, 80, 3), 1, 80 / 396, 80 / 132, 80 / 132),
    ],
)
def test_grids(grid: tuple[int, ...], most: int, waves: float, balance: float, used: float) -> None:
    found = cost_model.Grid(*grid)
    assert (found.most, found.waves, found.balance, found.used) == (most, waves, balance, used)


def test_cycles_of_a_tile_of_narrow_rows() -> None:
    """1,425 instructions of 8 warps in 4 slots; 96 · 32 · 8 exponentials at 16; 2 · 128³ operations; 128 rows read."""
    found = cost_model.tile_cycles(counts(trip=1425, trips=1, mufu=96), FORWARD)
    assert found == (2850, 1536, 1024, 2 * 128 * 128 / cost_model.L2, 0)
    first, second = (
        cost_model.tile_cycles(counts(trip=1, trips=2), FORWARD),
        cost_model.TileCycles(4, 0, *found[2:]),
    )
    assert first == second  # a loop that makes a tile in two trips


def test_cycles_of_a_tile_of_wide_rows() -> None:
    tile, wide = FORWARD._replace(depth=64, steps=16), counts(trip=120, trips=16, beside=1121, mufu=96)
    found = cost_model.tile_cycles(wide, tile)
    assert found == (2242, 1536, 8192, 2 * 256 * 1024 / cost_model.L2, 16 * 120 * 2)
    written = cost_model.tile_cycles(wide, tile._replace(is_program=True))
    assert written.l2 == 2 * (256 * 1024 + 128 * 128) / cost_model.L2
    unrolled = cost_model.tile_cycles(counts(trip=1500, trips=1, mufu=96), tile)
    assert unrolled == found._replace(issue=3000, steps=0)


def test_programs_hide_one_anothers_shorter_stage() -> None:
    cycles = cost_model.TileCycles(issue=2000, mufu=1500, tensor=1000, l2=900, steps=0)
    wait = cost_model.WAIT
    assert cycles.total(1, 1) == 2000 + 1000 + wait
    assert cycles.total(2, 1) == 2000 + (1000 + wait) / 2
    assert cycles._replace(mufu=3000).total(4, 2) == 3000 + (1000 + 2 * wait) / 4
    assert cycles._replace(l2=5000).total(1, 1) == 5000 + 2000 + wait


def test_the_fullest_multiprocessor_decides() -> None:
    cycles = cost_model.TileCycles(2000, 1500, 1000, 900, 0)
    alone, shared = (cost_model.Grid(programs, 3, 3 * programs, 2) for programs in (132, 133))
    known = counts(once=400)
    assert cost_model.launch_cycles(alone, cycles, known, FORWARD) == 3 * (3000 + cost_model.WAIT) + 400 * 8 / 4
    assert cost_model.launch_cycles(shared, cycles, known, FORWARD) == 2 * (3 * (2500 + cost_model.WAIT / 2) + 800)


def padded(rows: int, *sections: int) -> int:
    """Pairs of a row and a key at most, where each section and each side may be rounded up."""
    return (rows + ALIGNMENT) * (sum(sections) + (len(sections) + 1) * ALIGNMENT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_make_every_product(case: Case) -> None:
    _, N, C, D = case
    forward, backward = N * (N + C), N * (N + C) + C * N
    most = {"forward": padded(N, N, C), "backward": padded(N, N, C) + padded(C, N)}
    pairs = dict.fromkeys(most, 0)
    found = launches.launches_of(case)
    for launch in found:
        if "KEYS" in launch.arguments:
            pairs[("forward", "backward")[launch.in_backward]] += (
                launch.tiles * launch.arguments["ROWS"] * launch.arguments["KEYS"]
            )
            assert launch.tiles <= launch.programs * launch.tiles_a_program
    assert forward <= pairs["forward"] <= most["forward"]
    assert backward <= pairs["backward"] <= most["backward"] + len(found) * ALIGNMENT * (N + C)  # chunks round up too
    shapes = [launch.arguments["shape"] for launch in found if launch.name == "aten.mm"]
    made = sum(rows * inner * columns for rows, inner, columns in shapes)
    assert (backward * D <= made <= most["backward"] * D) if D > 256 else not shapes


def test_views_and_empty_tensors_are_no_launches() -> None:
    names = [launch.name for launch in launches.launches_of(CASES[0])]
    assert names[0] == "pack"
    assert not [name for name in names if "empty" in name or "view" in name or "select" in name]


def _launch(**changes: Any) -> launches.Launch:
    known = {"ROWS": 128, "KEYS": 64, "DEPTH": 128, "num_warps": 8, "num_stages": 3, "K": 128}
    return launches.Launch("backward", True, (4, 1), {**known, **changes})


def test_a_launch_finds_what_was_compiled_for_it() -> None:
    sizes = {"rows": "128", "keys": "64", "depth": "128", "warps": "8", "stages": "3", "maxnreg": ""}
    common = {"kernel": "backward", "arch": "90", "kind": "half", **sizes}
    compiled = [{**common, "K": K, "bounded": bounded} for K in ("256", "128") for bounded in ("False", "True")]
    assert cost_model.compiled_row(_launch(), compiled) is compiled[3]
    assert cost_model.compiled_row(_launch(K=256), compiled) is compiled[1]
    for other in ({"K": 160}, {"num_stages": 2}, {"maxnreg": 128}):
        with pytest.raises(LookupError, match="make aot"):
            cost_model.compiled_row(_launch(**other), compiled)


def test_figures_are_written_without_exponents() -> None:
    found = cost_model.written({"case": "one", "balance": 0.5151515, "tile_cycles": 24804.2, "programs": 1056768})
    assert (found["balance"], found["tile_cycles"], found["programs"]) == ("0.5152", "24800", "1056768")
    assert found["tile"] == ""
