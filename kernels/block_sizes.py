"""Launch choices: block sizes by kernel, architecture, math mode and width, and what bounds the workspace.

`bench/kernels/aot.py` compiles every entry and records its registers, spills and shared memory; `tune.py` beside it
times others.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rcl_fast.kernels.block_size_table import TABLE


class BlockSizes(NamedTuple):
    """Block sizes of one kernel, and options of the compiler."""

    rows: int  # rows of a tile: anchors, or prototypes in their gradient
    keys: int  # keys of a tile
    depth: int  # features of a step; whole rows where it is at least their number
    warps: int
    stages: int
    maxnreg: int | None = None  # registers of a thread at most; None: as many as the compiler likes

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
# Programs that fill the device: about two to a multiprocessor of the largest chip of each architecture.
PROGRAMS = {70: 160, 75: 144, 80: 216, 86: 168, 89: 284, 90: 264, 100: 296, 120: 340}
ARCHITECTURES = tuple(PROGRAMS)

# Rows up to this width keep their gradient in registers; wider ones take the workspace and plain matrix products.
REGISTER_WIDTH = {"half": 256, "tf32": 128, "ieee": 64}
# Largest workspace for dL/dlogits.
WORKSPACE_BYTES = 256 * 2**20
# Up to this many anchors the labels are compared one by one; above, a histogram costs less.
SCAN_LIMIT = 4096


@cache
def architecture(device: torch.device) -> int:
    """Returns the table's newest architecture that is not newer than the device's; 80 where it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in ARCHITECTURES if known <= 10 * major + minor), default=ARCHITECTURES[0])


def math_modes(arch: int) -> tuple[str, ...]:
    """Returns the math modes of an architecture: TF32 came with sm_80."""
    return MATH_MODES if arch >= 80 else ("half", "ieee")


def math_mode_of(dtype: torch.dtype, arch: int) -> str:
    """Returns how PyTorch multiplies matrices of this dtype under the current matmul precision."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if arch < 80 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def product_of(keys: Tensor) -> tuple[int, str]:
    """Returns the architecture and the math mode of the products of these keys."""
    arch = architecture(keys.device)
    return arch, math_mode_of(keys.dtype, arch)


def in_registers(arch: int, math_mode: str, width: int) -> bool:
    """Returns whether rows of this width keep their gradient in registers.

    Triton has tensor-core products from sm_80 on.
    """
    return width <= REGISTER_WIDTH[math_mode if arch >= 80 else "ieee"]


def choose(kernel: str, arch: int, math_mode: str, width: int, rows: int, keys: int) -> BlockSizes:
    """Returns the first, largest tile of the entry that still gives every multiprocessor work, or else the smallest."""
    bucket = next((known for known in WIDTHS[kernel] if width <= known), WIDTHS[kernel][-1])
    candidates = [BlockSizes(*entry) for entry in TABLE[kernel, arch, math_mode, bucket]]
    for candidate in candidates:
        if -(-rows // candidate.rows) * -(-keys // candidate.keys) >= PROGRAMS[arch]:
            return candidate
    return candidates[-1]


def split(arch: int, row_blocks: int, tiles: int) -> tuple[int, int]:
    """Returns (splits, key tiles of each) that fill the device; no split is empty."""
    wanted = max(1, PROGRAMS[arch] // row_blocks)
    tiles_per_split = max(1, triton.cdiv(tiles, wanted))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def packed_width(D: int) -> int:
    """Returns the columns of a packed key: D rounded up, so that every row starts at an aligned address."""
    return -(-D // 16) * 16


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


def is_bounded(temperature: float, normalize: bool, factors: Tensor | None, counts: Tensor | None) -> bool:
    """Returns whether 2^s and 2^b need no running maximum.

    |s| ≤ 1/T is certain for unit rows that nothing compresses, n < 2^64 for integers. Compression factors and floating
    counts are values on the device, and may be any.
    """
    if not normalize or factors is not None or (counts is not None and counts.dtype.is_floating_point):
        return False
    return math.log2(math.e) / temperature <= BOUNDED_OCTAVES
