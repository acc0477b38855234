"""The golden cases, worked by an independent program."""

from pathlib import Path

import numpy as np
import pytest

GOLDEN = sorted((Path(__file__).parent.parent / "data" / "golden").glob("*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(request.param) as archive:
        return dict(archive)
