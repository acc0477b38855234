"""The lock of a run's folder, and what it says of a run."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.rundir import status, writer


def in_a_fork(function: Callable[[Path], Any], folder: Path) -> Any:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, (folder,))


def refused(folder: Path) -> bool:
    """Whether another process, forked from this one, is."""
    return in_a_fork(_is_refused, folder)


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


def test_a_run_that_says_running_and_has_no_process_was_killed(tmp_path: Path) -> None:
    status.write(tmp_path, "running")
    assert status.now(tmp_path) == "running"  # of an earlier trainer, which had no lock
    with writer.only_writer(tmp_path):
        assert not in_a_fork(writer.is_free, tmp_path)
        assert in_a_fork(status.now, tmp_path) == "running"
        assert refused(tmp_path)  # to ask took nothing away
    assert status.now(tmp_path) == "killed"
    assert status.read(tmp_path) == "running"
    status.write(tmp_path, "finished")
    assert status.now(tmp_path) == "finished"


@pytest.mark.parametrize("content", ["", "[1]", "7", '"finished"', "{}", '{"status": 3}', "null"])
def test_a_damaged_status_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / status.FILE).write_text(content)
    assert status.read(tmp_path) is None
    assert status.now(tmp_path) is None


def test_a_folder_that_can_not_be_locked_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritten, match=r"nothing can be written to .*/none"), writer.only_writer(tmp_path / "none"):
        pass
