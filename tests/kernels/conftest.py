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

    def set_tiles(rows: int = 16, keys: int = 32, depth: int = 16, programs: int = 8, register_width: int = 64) -> None:
        def choose(kernel: str, arch: int, math_mode: str, width: int, *_: int) -> block_sizes.BlockSizes:
            whole_row = 1 << (width - 1).bit_length()
            return block_sizes.BlockSizes(rows, keys, whole_row if kernel == "backward" else depth, warps=4, stages=1)

        monkeypatch.setattr(block_sizes, "choose", choose)
        monkeypatch.setattr(block_sizes, "PROGRAMS", dict.fromkeys(block_sizes.PROGRAMS, programs))
        monkeypatch.setattr(block_sizes, "REGISTER_WIDTH", dict.fromkeys(block_sizes.MATH_MODES, register_width))

    set_tiles()
    return set_tiles
