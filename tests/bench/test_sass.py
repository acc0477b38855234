"""What bench/kernels reads in machine code: loops, and counts of a tile, on short made-up kernels."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernels import counts, sass

WARPGROUP = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"  # a step of 16 features of 64×64 pairs, with four warps
END = ("EXIT", "self: BRA self", "NOP", "NOP")


def machine_code(*lines: str) -> str:
    """Writes lines as cuobjdump does, 16 bytes apart; "name: code" is a place that "BRA name" goes to."""
    places = {line.split(": ")[0]: 16 * index for index, line in enumerate(lines) if ": " in line}
    text = ""
    for index, line in enumerate(lines):
        code = line.split(": ")[-1]
        for name, address in places.items():
            code = code.replace(f" {name}", f" {address:#x}")
        predicate, code = code.split(" ", 1) if code.startswith("@") else ("", code)
        text += f"        /*{16 * index:04x}*/  {predicate:>16} {code} ;   /* 0x000fe20000000f00 */\n"
        text += f"{'':80}/* 0x000fe40000000f00 */\n"
    return text


def tile(steps: int = 1, products: int = 1, size: int = 2, **changes: Any) -> counts.Tile:
    known = counts.Tile(64, 64, 16, steps, products, warps=4, bytes=size, is_program=False)
    return known._replace(**changes)


def loops(*lines: str) -> list[list[str]]:
    """The opcodes of each loop, the smallest first."""
    blocks = sass.blocks_of(sass.instructions_of(machine_code(*lines)))
    found = [
        [one.opcode for block in sorted(body) for one in blocks[block].instructions] for body in sass.loops_of(blocks)
    ]
    return sorted(found, key=len)


def test_instructions_have_their_predicates_and_targets_and_no_padding() -> None:
    text = machine_code("MOV R1, c[0x0][0x28]", "@!P0 BRA there", "LDG.E R2, [R4.64]", "there: STG.E [R4.64], R2", *END)
    assert sass.instructions_of(text) == [
        (0, "MOV", False, None),
        (16, "BRA", True, 48),
        (32, "LDG.E", False, None),
        (48, "STG.E", False, None),
        (64, "EXIT", False, None),
    ]


def test_a_branch_with_a_condition_of_its_own_goes_on_too() -> None:
    """As sm_90 and later write it, with what sm_120 writes behind it."""
    loop = ("again: FADD R1, R1, R2", "BRA.U UP0, again                ?trans5", *END)
    assert loops("MOV R1, RZ", *loop) == [["FADD", "BRA.U"]]


def test_a_call_may_be_no_more_than_a_branch() -> None:
    """ptxas leaves a loop so on sm_80; the call never comes back."""
    assert loops(
        "MOV R1, RZ", "again: FADD R1, R1, R2", "@P0 CALL.REL.NOINC out", "BRA again", "out: STS [R1], R2", *END
    ) == [["FADD", "CALL.REL.NOINC", "BRA"]]


def test_loops_hold_inner_loops_and_what_is_skipped() -> None:
    assert loops(
        "outer: MOV R1, RZ", "inner: FADD R1, R1, R2", "@P0 BRA inner", "@P1 BRA past", "STS [R1], R2",
        "past: IADD3 R3, R3, 0x1, RZ", "@P2 BRA outer", *END,
    ) == [["FADD", "BRA"], ["MOV", "FADD", "BRA", "BRA", "STS", "IADD3", "BRA"]]  # fmt: skip


def test_a_jump_back_from_behind_the_end_is_no_loop() -> None:
    assert not loops(
        "MOV R1, RZ", "@P0 BRA aside", "back: FADD R1, R1, R2", "EXIT", "aside: MOV R2, RZ", "BRA back", *END
    )


def test_a_trip_of_narrow_rows_is_a_tile() -> None:
    found = counts.counts_of(
        machine_code(
            "MOV R1, RZ", "LDG.E R2, [R4.64]", f"again: {WARPGROUP}", "LDG.E R2, [R4.64]", "LDGSTS.E [R2], [R4.64]",
            "MUFU.EX2 R8, R8", "@P0 FSEL R8, R8, RZ, P1", "BAR.SYNC.DEFER_BLOCKING 0x0", "@P0 BRA again",
            "STG.E [R4.64], R2", *END,
        ),
        tile(),
    )  # fmt: skip
    assert found == counts.Counts(
        trip=7, trips=1, beside=0, once=4, tensor=1, mufu=1, ldg=1, ldgsts=1, lds=0, sts=0, barriers=1, choices=1,
        per_element=7 * 128 / 4096, mufu_per_element=128 / 4096,
    )  # fmt: skip


WIDE = (
    "MOV R1, RZ", "tile: MOV R2, RZ", f"step: {WARPGROUP}", "LDS R3, [R2]", "@P0 BRA step", "MUFU.EX2 R8, R8",
    "MUFU.EX2 R9, R9", "@P1 BRA tile", "STG.E [R4.64], R2", *END,
)  # fmt: skip


def test_a_tile_of_wide_rows_is_its_steps_and_what_stands_beside_them() -> None:
    found = counts.counts_of(machine_code(*WIDE), tile(steps=10))
    assert (found.trip, found.trips, found.beside, found.once) == (3, 10, 4, 3)
    assert (found.tensor, found.lds, found.mufu) == (10, 10, 2)
    assert found.per_element == (10 * 3 + 4) * 128 / 4096


def test_a_program_that_is_a_tile_has_nothing_once() -> None:
    found = counts.counts_of(machine_code(*(line for line in WIDE if "tile" not in line)), tile(10, is_program=True))
    assert (found.trip, found.trips, found.beside, found.once) == (3, 10, 5, 0)


def test_a_program_without_a_loop_is_a_tile_too() -> None:
    found = counts.counts_of(
        machine_code("MOV R1, RZ", *[WARPGROUP] * 10, "STG.E [R4.64], R2", *END), tile(10, is_program=True)
    )
    assert (found.trip, found.trips, found.beside, found.once, found.tensor) == (13, 1, 0, 0, 10)


def test_an_unrolled_loop_takes_fewer_trips() -> None:
    unrolled = machine_code(*(part for line in WIDE for part in (line, *([WARPGROUP] if "step:" in line else []))))
    assert counts.counts_of(unrolled, tile(steps=10)).trips == 5
    with pytest.raises(ValueError, match=r"mend bench/kernels/counts\.py"):
        counts.counts_of(unrolled, tile(steps=5))


def test_a_step_before_the_loop_is_a_trip_less() -> None:
    peeled = machine_code(*(f"tile: {WARPGROUP}" if "tile:" in line else line for line in WIDE))
    found = counts.counts_of(peeled, tile(steps=10))
    assert (found.trips, found.tensor) == (9, 10)


def test_warps_that_share_rows_make_the_products_twice() -> None:
    """Eight warps, of which each four need 64 rows: no tile is made in half a trip."""
    found = counts.counts_of(machine_code("MOV R1, RZ", f"again: {WARPGROUP}", "@P0 BRA again", *END), tile(warps=8))
    assert (found.trips, found.per_element) == (1, 2 * 256 / 4096)


def test_of_two_loops_over_tiles_the_first_counts() -> None:
    """The other one is of the tiles that hold the diagonal: a few. The compiler may unroll the steps of either."""
    diagonal = ("diagonal: MOV R2, RZ", *[WARPGROUP] * 10, "@P1 BRA diagonal")
    found = counts.counts_of(machine_code(*WIDE[:-5], *diagonal, *END), tile(steps=10))
    assert (found.trip, found.trips, found.beside, found.once) == (3, 10, 4, 2)


@pytest.mark.parametrize(
    ("code", "steps", "products", "size", "trips"),
    [
        ("HMMA.16816.F32.BF16 R1, R2, R3, R1", 1, 1, 2, 8),  # 64·64·16 / (4 warps · 16·8·16)
        ("HMMA.1688.F32.TF32 R1, R2, R3, R1", 1, 1, 4, 16),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT", 10, 1, 2, 10),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT", 10, 1, 4, 20),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT", 1, 2, 2, 5),  # 1 and 64/16
        ("FFMA R1, R2, R3, R1", 10, 1, 4, 10),  # no tensor core: a step a trip
    ],
)  # fmt: skip
def test_every_architecture_has_its_products(code: str, steps: int, products: int, size: int, trips: int) -> None:
    found = counts.counts_of(
        machine_code("MOV R1, RZ", f"again: {code}", "@P0 BRA again", *END), tile(steps, products, size)
    )
    assert (found.trips, found.trip) == (trips, 2)


def test_a_kernel_without_products_has_no_counts() -> None:
    text = machine_code("MOV R1, RZ", "again: FADD R1, R1, R2", "@P0 BRA again", *END)
    assert counts.counts_of(text, tile()) == counts.NOTHING
