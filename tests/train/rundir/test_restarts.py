"""torchrun's restarts: which command line goes on with which folder. A whole restart: test_torchrun.py."""

from pathlib import Path

import pytest

from rcl_fast.train.rundir import restarts


@pytest.fixture(autouse=True)
def torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of torchrun that made the folder "run", and was then restarted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job/7")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/logs/job_one/attempt_0/0/error.json")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Path("run").mkdir()
    restarts.remember(Path("run"))


def test_a_restarted_run_resumes_in_its_folder() -> None:
    Path("run/mid_epoch.pt").touch()
    assert restarts.arguments(["--lr", "1"]) == ["--lr", "1", "--resume", "run"]


def test_without_a_checkpoint_it_starts_anew_there() -> None:
    assert restarts.arguments(["--lr", "1"]) == ["--lr", "1", "--output", "run"]
    assert restarts.arguments(["--output=run"]) == ["--output=run"]


def test_a_resumed_run_resumes_again() -> None:
    Path("run/last.pt").touch()
    assert restarts.arguments(["--resume", "run"]) == ["--resume", "run"]


def test_a_first_start_knows_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of an earlier run of the same id."""
    Path("run/last.pt").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/logs/job_two/attempt_0/0/error.json")
    assert restarts.arguments([]) == []
    restarts.forget()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarts.arguments([]) == []


def test_a_restart_that_torchrun_did_not_count_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node's process failed, and this node's torchrun joined that node's again: its own count is still 0."""
    Path("run/last.pt").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    restarts.forget()
    assert restarts.arguments([]) == ["--resume", "run"]


def test_runs_without_an_id_of_their_own_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run/last.pt").touch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert restarts.arguments([]) == []
    restarts.remember(Path("run"))
    monkeypatch.setattr(restarts.os, "getppid", lambda: 1)
    assert restarts.arguments([]) == []
