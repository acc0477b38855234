"""Kernels run on the GPU where there is one, and under Triton's interpreter on the CPU otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rcl_fast.kernels import block_sizes

# Without it PyTorch refuses cuBLAS's products where algorithms are to be deterministic, as a fixture below asks.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter

    interpreter.repair()

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=sorted(path.stem for path in GOLDEN.glob("*.npz")))
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """A worked case, made by an independent program in float64."""
    with np.load(GOLDEN / f"{request.param}.npz") as archive:
        return dict(archive)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Every buffer of torch.empty starts as NaN (integers: their largest value), so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tiles so small that 40 rows are several of them; call it for other sizes, or another regime."""

    def set_tiles(rows: int = 16, keys: int = 32, depth: int = 16, splits: int = 3, register_width: int = 64) -> None:
        def candidates(kernel: str, arch: int, math_mode: str, width: int) -> tuple[block_sizes.BlockSizes, ...]:
            whole_row = 1 << (width - 1).bit_length()
            deep = whole_row if kernel == "backward" else depth
            return (block_sizes.BlockSizes(rows, keys, deep, warps=4, stages=1, programs=2),)

        for cached in (block_sizes._best, block_sizes._launches):  # of other splits, for the same tiles
            cached.cache_clear()
        monkeypatch.setattr(block_sizes, "candidates", candidates)

        def grid_of(
            kernel: str, device: block_sizes.Processor, sizes: block_sizes.BlockSizes, width: int, rows: int, keys: int
        ) -> block_sizes.Grid:
            row_blocks, tiles = -(-rows // sizes.rows), -(-keys // sizes.keys)
            each = 1 if kernel == "dlogits" else max(1, -(-tiles // splits))
            return block_sizes.Grid(row_blocks, max(1, -(-tiles // each)), tiles, each)

        monkeypatch.setattr(block_sizes, "grid_of", grid_of)
        monkeypatch.setattr(block_sizes, "ALIGNMENT", max(rows, keys))
        monkeypatch.setattr(block_sizes, "REGISTER_WIDTH", dict.fromkeys(block_sizes.MATH_MODES, register_width))

    set_tiles()
    return set_tiles
