"""The lock of a run's folder."""

import multiprocessing
from pathlib import Path

import pytest

from rcl_fast.train.errors import UserError
from rcl_fast.train.rundir import writer


def refused(folder: Path) -> bool:
    """Whether another process, forked from this one, is."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_is_refused, (folder,))


def _is_refused(folder: Path) -> bool:
    try:
        with writer.only_writer(folder):
            return False
    except UserError as error:
        return f"another process is writing to {folder}" in str(error)


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    with writer.only_writer(tmp_path):
        assert refused(tmp_path)
    assert not refused(tmp_path)


def test_a_disk_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr(writer.fcntl, "lockf", lockf)
    with writer.only_writer(tmp_path):
        pass
