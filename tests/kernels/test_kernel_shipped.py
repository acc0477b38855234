"""The shipped tiles; the other tests take tiny ones, to have several of them on every axis."""

from __future__ import annotations

import pytest
import shipped
import torch


@pytest.fixture
def tiny_tiles() -> None:
    """Overrides the fixture of that name: the table's own tiles."""


@pytest.mark.parametrize("case", shipped.INTERPRETED_CASES, ids=str)
def test_shipped_tiles(case: shipped.Shipped, device: torch.device) -> None:
    shipped.check(case, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the whole table takes a GPU")
@pytest.mark.parametrize("case", list(shipped.gpu_cases()), ids=str)
def test_every_kind_width_and_size_of_tile(case: shipped.Shipped, device: torch.device) -> None:
    shipped.check(case, device)
