"""Launch choices: block sizes by kernel, architecture, math mode and width, and how the keys are split.

`bench/kernels/aot.py` compiles every entry and records its registers, spills and shared memory; `tune.py` beside it
times others. README.md says what a choice costs.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rcl_fast.kernels.block_size_table import TABLE


class BlockSizes(NamedTuple):
    """Block sizes of one kernel, and options of the compiler."""

    rows: int  # rows of a tile: anchors, or other keys in their gradient
    keys: int  # keys of a tile
    depth: int  # features of a step; whole rows where it is at least their number
    warps: int
    stages: int
    programs: int  # that a multiprocessor holds at once, as compiled
    maxnreg: int | None = None  # registers of a thread at most; None: as many as the compiler likes

    def is_wide(self, width: int) -> bool:
        """Returns whether rows take several steps: both sides of each tile are then read anew."""
        return width > self.depth

    @property
    def options(self) -> dict[str, int]:
        """The launch's own keyword arguments; not every backend of Triton knows maxnreg."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    def constants(self, math_mode: str) -> dict[str, int | str]:
        """The kernel's compile-time arguments that say how a tile is computed, in this math mode."""
        precision = "tf32" if math_mode == "tf32" else "ieee"  # 16-bit products have one way only
        return {"ROWS": self.rows, "KEYS": self.keys, "DEPTH": self.depth, "PRECISION": precision}


# How products are made: of 16-bit numbers, of float32 through TF32, of float32 exactly.
MATH_MODES = ("half", "tf32", "ieee")
# Widths up to which an entry holds. A kernel's last entry holds for every wider row too.
WIDTHS = {"forward": (64, 128, 256, 2048), "backward": (64, 128, 256), "dlogits": (2048,)}
# Multiprocessors of the largest chip of each architecture, where no device tells its own.
MULTIPROCESSORS = {70: 80, 75: 72, 80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = tuple(MULTIPROCESSORS)

# Offsets into the vectors [6, P] are 32-bit.
MOST_ROWS = 2**31 // 6
# The most programs on a grid's second axis.
MOST_PROGRAMS = 65_535
# Rows of packed keys come in multiples of this, the longest side of a tile: no tile needs a mask.
ALIGNMENT = 128
# Rows up to this width keep their gradient in registers; wider ones take the workspace and plain matrix products.
REGISTER_WIDTH = {"half": 256, "tf32": 128, "ieee": 64}
# What one more launch costs, about, in pairs of wide rows: a microsecond or two in a CUDA graph.
LAUNCH_PAIRS = 2048
# Largest workspace for dL/dlogits.
WORKSPACE_BYTES = 256 * 2**20
# Up to this many anchors and extra keys labels are compared one by one; above, a histogram costs less.
SCAN_LIMIT = 4096


class Processor(NamedTuple):
    """A device, as far as a launch depends on it."""

    arch: int  # of the table
    multiprocessors: int


@cache
def processor(device: torch.device) -> Processor:
    """Returns the table's newest architecture that is not newer than the device's; 80 where it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return Processor(80, MULTIPROCESSORS[80])
    found = torch.cuda.get_device_properties(device)
    version = 10 * found.major + found.minor
    arch = max((known for known in ARCHITECTURES if known <= version), default=ARCHITECTURES[0])
    return Processor(arch, found.multi_processor_count)


def math_modes(arch: int) -> tuple[str, ...]:
    """Returns the math modes of an architecture: TF32 came with sm_80."""
    return MATH_MODES if arch >= 80 else ("half", "ieee")


def math_mode_of(dtype: torch.dtype, arch: int) -> str:
    """Returns how PyTorch multiplies matrices of this dtype under the current matmul precision."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if arch < 80 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def product_of(keys: Tensor) -> tuple[Processor, str]:
    """Returns where these keys are multiplied, and the math mode of their products."""
    device = processor(keys.device)
    return device, math_mode_of(keys.dtype, device.arch)


def in_registers(device: Processor, math_mode: str, width: int) -> bool:
    """Returns whether rows of this width keep their gradient in registers.

    Triton has tensor-core products from sm_80 on.
    """
    return width <= REGISTER_WIDTH[math_mode if device.arch >= 80 else "ieee"]


class Grid(NamedTuple):
    """The programs of a launch: row blocks, and splits of the keys with so many tiles each."""

    row_blocks: int
    splits: int
    tiles: int
    tiles_per_split: int

    def a_multiprocessor(self, multiprocessors: int) -> int:
        """Returns the programs of the busiest multiprocessor, as they are dealt out in turn."""
        return _cdiv(self.row_blocks * self.splits, multiprocessors)

    def balance(self, multiprocessors: int) -> float:
        """Returns the tiles of the average multiprocessor over those of the busiest one."""
        most = self.a_multiprocessor(multiprocessors) * self.tiles_per_split
        return self.row_blocks * self.tiles / (multiprocessors * most)


def choose(kernel: str, device: Processor, math_mode: str, width: int, rows: int, keys: int) -> tuple[BlockSizes, Grid]:
    """Returns the tile and the grid of least cost, a smaller tile only if it costs a tenth less, as it reads keys more.

    Raises KeyError for a kernel, architecture or math mode without an entry.
    """
    return _best(kernel, device, candidates(kernel, device.arch, math_mode, width), width, rows, keys)


@lru_cache(maxsize=4096)  # a call of the loss asks for each launch, and shapes come back
def _best(
    kernel: str, device: Processor, tiles: tuple[BlockSizes, ...], width: int, rows: int, keys: int
) -> tuple[BlockSizes, Grid]:
    best: tuple[float, BlockSizes, Grid] | None = None
    for sizes in tiles:
        grid = grid_of(kernel, device, sizes, width, rows, keys)
        cost = _cost(kernel, device, sizes, grid, width)
        if best is None or cost < 0.9 * best[0]:
            best = cost, sizes, grid
    assert best is not None  # every entry has a tile
    return best[1:]


class Launch(NamedTuple):
    """One of the launches that cover the keys."""

    sizes: BlockSizes
    grid: Grid
    first_key: int  # before it are those of other launches


def launches(kernel: str, device: Processor, math_mode: str, width: int, rows: int, keys: int) -> tuple[Launch, ...]:
    """Returns launches that cover all keys: one; or full rounds of large tiles, then small ones for the keys left over.

    Two for wide rows where that saves a tenth: a round in which few multiprocessors work takes as long as a full one.
    Narrow rows have splits for that.
    """
    return _launches(kernel, device, candidates(kernel, device.arch, math_mode, width), width, rows, keys)


@lru_cache(maxsize=4096)
def _launches(
    kernel: str, device: Processor, tiles: tuple[BlockSizes, ...], width: int, rows: int, keys: int
) -> tuple[Launch, ...]:
    if kernel == "dlogits":  # a program a tile of keys
        most = MOST_PROGRAMS * min(sizes.keys for sizes in tiles) // ALIGNMENT * ALIGNMENT
        if keys > most:
            of_first = _launches(kernel, device, tiles, width, rows, most)
            others = _launches(kernel, device, tiles, width, rows, keys - most)
            return (*of_first, *(one._replace(first_key=most + one.first_key) for one in others))
    sizes, grid = _best(kernel, device, tiles, width, rows, keys)
    one = (Launch(sizes, grid, 0),)
    large, small = tiles[0], tiles[-1]
    row_blocks, large_tiles = _cdiv(rows, large.rows), _cdiv(keys, large.keys)
    full_rounds = row_blocks * large_tiles // device.multiprocessors
    in_rounds = full_rounds * device.multiprocessors // max(1, row_blocks) * large.keys
    if not large.is_wide(width) or not 0 < in_rounds < keys:
        return one
    rounds = Launch(large, grid_of(kernel, device, large, width, rows, in_rounds), 0)
    rest = Launch(small, grid_of(kernel, device, small, width, rows, keys - in_rounds), in_rounds)
    of_two = _cost(kernel, device, large, rounds.grid, width) + _work(kernel, device, small, rest.grid, width)
    return (rounds, rest) if of_two + LAUNCH_PAIRS < 0.9 * _cost(kernel, device, sizes, grid, width) else one


@cache
def candidates(kernel: str, arch: int, math_mode: str, width: int) -> tuple[BlockSizes, ...]:
    """Returns the tiles of the table's entry, the largest first."""
    bucket = next((known for known in WIDTHS[kernel] if width <= known), WIDTHS[kernel][-1])
    return tuple(BlockSizes(*entry) for entry in TABLE[kernel, arch, math_mode, bucket])


def grid_of(kernel: str, device: Processor, sizes: BlockSizes, width: int, rows: int, keys: int) -> Grid:
    """Returns the grid of the fewest splits that costs at most a twentieth more than the best; no split is empty."""
    row_blocks, tiles = max(1, _cdiv(rows, sizes.rows)), _cdiv(keys, sizes.keys)
    if kernel == "dlogits" or tiles == 0:  # a program a tile
        return Grid(row_blocks, max(1, tiles), tiles, 1)
    most = max(8, 2 * device.multiprocessors * sizes.programs // row_blocks)
    in_a_split = dict.fromkeys(_cdiv(tiles, splits) for splits in range(1, min(tiles, most) + 1))
    grids = [Grid(row_blocks, _cdiv(tiles, each), tiles, each) for each in in_a_split]
    costs = [_cost(kernel, device, sizes, grid, width) for grid in grids]
    return next(grid for grid, cost in zip(grids, costs, strict=True) if cost <= 1.05 * min(costs))


def _cost(kernel: str, device: Processor, sizes: BlockSizes, grid: Grid, width: int) -> float:
    """Returns the busiest multiprocessor's work and waiting, in pairs of a row and a key.

    A program alone waits for its products; others that are there use the time.
    """
    at_once = min(grid.a_multiprocessor(device.multiprocessors), sizes.programs)
    return _work(kernel, device, sizes, grid, width) * (1 + 1 / at_once) / (1 + 1 / sizes.programs)


def _work(kernel: str, device: Processor, sizes: BlockSizes, grid: Grid, width: int) -> float:
    """Returns the busiest multiprocessor's work, in pairs of a row and a key.

    A split of the forward pass costs a tile more. In the backward pass it writes 4 bytes a feature, and they are read
    again: as long as four pairs take. Wide rows wait for the L2 cache: a pair takes as long as its share of the two
    sides of a tile, and a split costs nothing.
    """
    programs = grid.a_multiprocessor(device.multiprocessors)
    if sizes.is_wide(width):
        return programs * grid.tiles_per_split * 64 * (sizes.rows + sizes.keys)  # the pairs of a tile of 128×128
    split = 4 * width if kernel == "backward" else sizes.keys
    return programs * sizes.rows * (grid.tiles_per_split * sizes.keys + split)


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)


def aligned(rows: int) -> int:
    """Returns how many rows the packed keys have for so many."""
    return _cdiv(rows, ALIGNMENT) * ALIGNMENT


def packed_width(D: int) -> int:
    """Returns the columns of a packed key: D rounded up, so that every row starts at an aligned address."""
    return _cdiv(D, 16) * 16


def exponents(dtype: torch.dtype, normalize: bool) -> int:
    """Returns the largest exponent of a power of two that a packed row is divided by, and minus the smallest.

    Unit rows take any that float32 holds, its inverse too. Others keep it in their scale, which must not overflow; in
    float16 they stay as they are, as no product of them leaves float32, and dlogits times the scale is float16.
    """
    if normalize:
        return 126
    return 0 if dtype == torch.float16 else 60


def headroom(dtype: torch.dtype, normalize: bool) -> int:
    """Returns the exponent of a packed row's largest number: in float16 so high that small ones keep their bits."""
    return 10 if normalize and dtype == torch.float16 else 0


# Octaves of similarity up to which 2^s needs no running maximum: log2 n and log2 M on top leave it far inside float32.
BOUNDED_OCTAVES = 32.0


def is_bounded(temperature: float, normalize: bool, factors_at_most_one: bool, counts: Tensor | None) -> bool:
    """Returns whether 2^s and 2^b need no running maximum.

    |s| ≤ 1/T is certain for unit rows that no factor makes longer, n < 2^64 for integers. Floating counts are values on
    the device, and may be any, as factors may of which nothing is known.
    """
    if not normalize or not factors_at_most_one or (counts is not None and counts.dtype.is_floating_point):
        return False
    return math.log2(math.e) / temperature <= BOUNDED_OCTAVES
