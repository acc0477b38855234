"""Count in a kernel's machine code what a tile takes: instructions in all and by kind, a trip of the main loop apart.

The main loop is the innermost one that has the products. A trip of it makes a tile; in wide rows it makes one step of
the products, so that a tile takes several trips and what stands beside them, unless the compiler unrolls them. Every
instruction of a loop counts: a predicated one takes its turn whether or not it does anything, and of a branch both
sides count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from bench.kernels.sass import blocks_of, instructions_of, loops_of

# What is counted apart: the name of the column, and the opcodes up to their first point.
KINDS = {
    "tensor": ("HGMMA", "HMMA", "UTCHMMA"),  # of sm_90, of sm_80 to sm_89 and sm_120, of sm_100
    "mufu": ("MUFU",),  # exponentials and their like
    "ldg": ("LDG",),
    "ldgsts": ("LDGSTS",),
    "lds": ("LDS", "LDSM"),
    "sts": ("STS",),
    "barriers": ("BAR", "SYNCS"),
    "choices": ("ISETP", "FSETP", "SEL", "FSEL", "LOP3", "PLOP3", "P2R", "R2P"),  # masks, comparisons, selects
}
# Multiplications and additions of an instruction of one warp, by its shape; sm_90's is of four warps.
_WARP_PRODUCTS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
_WARPGROUP_PRODUCTS = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")


class Tile(NamedTuple):
    """What is known of a kernel's tile without its machine code."""

    rows: int
    keys: int
    depth: int
    steps: int  # of depth, to the width of a row
    products: int  # of keys and rows: 1 or 2
    warps: int
    bytes: int  # of a number in a product
    is_program: bool  # a program is one tile: there is no loop over tiles

    @property
    def multiplications(self) -> float:
        """Of one warp."""
        return self.products * self.steps * self.rows * self.keys * self.depth / self.warps

    @property
    def block_products(self) -> int:
        """Instructions of sm_100 that make the tile: 128 rows and 32 bytes of a key at a time, one for all warps."""
        summed = self.steps * self.depth + (self.products - 1) * self.keys
        return -(-self.rows // 128) * summed * self.bytes // 32


class Counts(NamedTuple):
    """Instructions of one warp, counted; all 0 where there is no loop that makes products."""

    trip: int  # of the main loop
    trips: float  # a tile; under 1: a trip makes several tiles
    beside: int  # a tile, outside the main loop
    once: int  # a program, outside its tiles
    tensor: float  # a tile, as all that follow
    mufu: float
    ldg: float
    ldgsts: float
    lds: float
    sts: float
    barriers: float
    choices: float
    per_element: float  # of the tile, all warps together, 32 threads each
    mufu_per_element: float


NOTHING = Counts(*[0] * len(Counts._fields))


def multiplications_of(opcode: str, tile: Tile) -> float:
    """Returns the multiplications that a tensor-core instruction makes, a warp; 0 for any other instruction."""
    if found := _WARPGROUP_PRODUCTS.match(opcode):
        rows, keys, depth = map(int, found.groups())
        return rows * keys * depth / 4
    name, *modifiers = opcode.split(".")
    if name == "UTCHMMA":  # its shape is in a register
        return tile.multiplications / tile.block_products
    return _WARP_PRODUCTS[modifiers[0]] if name == "HMMA" else 0


def counts_of(text: str, tile: Tile) -> Counts:
    """Returns the counts of a kernel's disassembly; of several loops over tiles, those of the first.

    Raises ValueError where its products are no part of the tile's: then its trips can't be told.
    """
    blocks = blocks_of(instructions_of(text))
    opcodes = [Counter(one.opcode for one in block.instructions) for block in blocks]

    def of(chosen: Collection[int]) -> Counter[str]:
        return sum((opcodes[block] for block in chosen), Counter())

    everywhere = frozenset(range(len(blocks)))
    makers = KINDS["tensor"] if _number(of(everywhere), KINDS["tensor"]) else ("FFMA", "FFMA2")
    making = [body for body in loops_of(blocks) if _number(of(body), makers)]
    innermost = [body for body in making if not any(other < body for other in making)]
    if not innermost:  # a program's steps may be unrolled, all of them
        return _counts(of(everywhere), Counter(), 0, tile) if tile.is_program else NOTHING
    most = max(_number(of(body), makers) for body in innermost)
    # Without tensor cores a few fused multiplications are no products. The kernels leave the diagonal to a later loop.
    main = next(body for body in innermost if makers == KINDS["tensor"] or _number(of(body), makers) > most / 2)
    around = everywhere if tile.is_program else min((body for body in making if main < body), key=len, default=main)
    beside = of(around - frozenset().union(*innermost))
    once = of(everywhere - (around if tile.is_program else frozenset().union(*making)))
    return _counts(of(main), beside, once.total(), tile)


def _counts(in_loop: Counter[str], beside: Counter[str], once: int, tile: Tile) -> Counts:
    """Returns the counts of a main loop with what stands beside it."""
    trips = _trips(in_loop, beside, tile)
    a_tile = {name: trips * _number(in_loop, kind) + _number(beside, kind) for name, kind in KINDS.items()}
    each = 32 * tile.warps / (tile.rows * tile.keys)
    per_element = each * (trips * in_loop.total() + beside.total())
    of_mufu = each * a_tile["mufu"]
    return Counts(
        in_loop.total(), trips, beside.total(), once, **a_tile, per_element=per_element, mufu_per_element=of_mufu
    )


def _number(found: Counter[str], kind: Sequence[str]) -> int:
    return sum(number for opcode, number in found.items() if opcode.split(".")[0] in kind)


def _trips(in_loop: Counter[str], beside: Counter[str], tile: Tile) -> int:
    """Returns the trips a tile, by the products that a trip makes; by the steps where no tensor core makes them.

    A trip that makes more than a whole tile does so because warps share rows: it makes them twice.
    """
    made, peeled = (
        sum(number * multiplications_of(opcode, tile) for opcode, number in found.items())
        for found in (in_loop, beside)
    )
    if not made:
        return tile.steps
    trips = max(1, (tile.multiplications - peeled) / made)
    if abs(trips - round(trips)) > 1e-6:
        raise ValueError(
            f"a trip of the main loop makes {made:,.0f} multiplications a warp, {peeled:,.0f} stand beside it, and a "
            f"tile has {tile.multiplications:,.0f}: look at the machine code, and mend bench/kernels/counts.py"
        )
    return round(trips)
