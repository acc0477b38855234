"""Shared by the trainer's tests: what whole runs can do without."""

import numpy as np
import pytest

from rcl_fast.train.command_line import log_to_console
from rcl_fast.train.report import feature_map, results


@pytest.fixture(autouse=True)
def _what_is_logged_is_printed() -> None:
    """As the commands have it: tests read what a run says."""
    log_to_console()


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than a few epochs."""
    monkeypatch.setattr(results, "write_report", lambda *_: None)


@pytest.fixture
def without_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written, with the first two features for a map: t-SNE is the longer half of a report."""
    monkeypatch.setattr(feature_map, "tsne", lambda features: features[:, :2].astype(np.float64))
