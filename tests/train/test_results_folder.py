"""Folders for results that can't be: each command refuses them before it reads any data, and says how to mend it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from rcl_fast.train import reproduce, run, second_stage, sweep
from rcl_fast.train.checks import check_results_folder
from rcl_fast.train.command_line import exit_with_message
from rcl_fast.train.config import parse
from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments import job_queue, runs, study
from rcl_fast.train.jobs import run_folder

LONG = "a" * 300


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a file, a link to itself, a link to nothing, and the configuration of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nothing").symlink_to("nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(parse([]).to_dict()))
    return tmp_path


def ended(main: Callable[[list[str]], object], *arguments: str) -> str:
    """What a command ends with."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return str(end.value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (LONG, " can't be used (File name too long): name another folder"),
        (f"new/{LONG}/x", " can't be used (File name too long): name another folder"),
        ("loop/x", " can't be used (Too many levels of symbolic links): name another folder"),
        ("nothing/x", " can't be used (No such file or directory): name another folder"),
        ("afile", ": afile is a file, not a folder; name another"),
        ("afile/x/y", ": afile is a file, not a folder; name another"),
        (os.fsdecode(b"caf\xe9"), ": TensorBoard writes to no folder whose name is not UTF-8"),
    ],
)
def test_every_command_refuses_a_folder_that_can_not_be(folder: str, said: str) -> None:
    said = folder.encode(errors="backslashreplace").decode() + said
    assert ended(run.main, "--data", "plain", "--output", folder) == f"--output {said}"
    assert ended(second_stage.main, "--run", "out", "--method", "crt", "--output", folder) == f"--output {said}"
    study_of = ("--dataset", "digits_lt", "--grid", "tau=1", "--study")
    assert ended(sweep.main, *study_of, folder) == f"--study {said}"
    table = ("table1", "--dataset", "digits_lt", "--seeds", "1")
    assert ended(reproduce.main, *table, "--folder", folder) == f"--folder {said}"
    assert ended(reproduce.main, *table, "--output", folder) == f"--output {said}"
    assert not Path("runs").exists()


def test_a_folder_that_may_not_be_written_to_or_searched(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_results_folder("--output", here / "out" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"--output out/new: out may not be written to; make it writable, or name"):
        check_results_folder("--output", Path("out/new"))

    def locked(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", locked)
    with pytest.raises(UserError, match=r"--output out/new can't be used \(Permission denied\): name another"):
        check_results_folder("--output", Path("out/new"))


@pytest.mark.usefixtures("here")
def test_a_table_is_shown_of_a_folder_that_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ("table1", "--dataset", "digits_lt", "--seeds", "1", "--no-run")
    assert ended(reproduce.main, *table, "--folder", "afile").startswith("--folder afile is a file, not a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: "out" not in Path(path).parts)
    assert ended(reproduce.main, *table, "--folder", "out", "--output", "tables") == "1"  # runs are missing
    assert (Path("tables") / "table1-digits_lt.md").is_file()
    assert "--output out/tables: out may not be written to" in ended(reproduce.main, *table, "--folder", "out")


@pytest.mark.usefixtures("here")
def test_a_path_that_the_system_refuses_is_named_without_a_traceback() -> None:
    assert ended(run.main, "--resume", LONG) == f"{LONG}/config.json can't be used: File name too long"
    assert LONG in ended(second_stage.main, "--run", LONG, "--method", "crt")
    with pytest.raises(OSError, match="no file"), exit_with_message():  # names none: a defect
        raise OSError("no file")


def test_runs_are_not_made_among_the_images(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [here / "data" / part for part in ("train", "val", "test")]
    for part in parts:
        (part / "a").mkdir(parents=True)
    for part in parts:
        monkeypatch.chdir(part)
        with ExitStack() as ends, pytest.raises(UserError, match=r"without --output, .* lies in the data, \.\./"):
            run_folder.claim(parse(["--data", ".."]), ends)
    with ExitStack() as ends:
        run_folder.claim(parse(["--data", "..", "--output", str(here / "elsewhere")]), ends)
        run_folder.claim(parse(["--data", "..", "--dataset", "cifar10_lt"]), ends)
        monkeypatch.chdir(here / "data")
        run_folder.claim(parse(["--data", "."]), ends)


@pytest.mark.usefixtures("here")
def test_only_optunas_journal_is_called_one() -> None:
    Path("old.log").write_text('{"op_code": 0, "worker_id": "x", "study_name": "s"}\n{"op_code": 4}\n')
    with pytest.raises(UserError, match=r"that file is a study of an earlier version.* runs in old-trials/"):
        study.check_place(Path("old.log"), None)
    for content in (b"", b"[1]\n", b"3\n", b"\xff\xd8\n"):
        Path("afile").write_bytes(content)
        with pytest.raises(UserError, match="afile is a file, not a folder"):
            study.check_place(Path("afile"), None)


@pytest.mark.usefixtures("here")
def test_a_data_set_whose_folder_is_not_there_starts_nothing() -> None:
    said = "is to be trained on, and --data nowhere is no folder"
    search = ("--grid", "tau=1,2", "--study", "st")
    assert said in ended(sweep.main, "--dataset", "folder", "--data", "nowhere", *search)
    assert said in ended(reproduce.main, "table1", "--data", "nowhere", "--seeds", "1", "--folder", "tab")
    assert not Path("st").exists()
    assert not Path("tab").exists()
    runs.check_data(parse(["--dataset", "folder", "--data", "out"]), None)
    runs.check_data(parse([]), Path("nowhere"))  # the digits are in a package


def test_a_failure_is_told_by_the_first_line_of_its_error(here: Path) -> None:
    log = here / "log"
    log.write_text("epoch 1\n")
    with pytest.raises(SystemExit) as end, exit_with_message():
        raise UserError("folder: not found below x:\n  train\nImage formats: .jpg")
    log.write_text(f"epoch 1\n{end.value}\n\n")
    assert job_queue._last_said(log) == "folder: not found below x:"
    log.write_text("Traceback:\n  File x\nKeyError: 3\n")
    assert job_queue._last_said(log) == "KeyError: 3"
    log.write_text("\n")
    assert job_queue._last_said(log) == "it said nothing"
