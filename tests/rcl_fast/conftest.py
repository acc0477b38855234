"""The golden cases, worked by an independent program, and processes that compute together."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import Processes

GOLDEN = sorted((Path(__file__).parent.parent / "data" / "golden").glob("*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(request.param) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.stop()
