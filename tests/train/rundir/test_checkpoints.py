"""Checkpoints: atomic, in generations, checked, never executed, and clear about damage."""

import errno
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from rcl_fast.train.errors import UserError
from rcl_fast.train.rundir import checkpoint_files, checkpoints
from rcl_fast.train.rundir.checkpoints import BEST, LAST, MID_EPOCH, PREVIOUS


def state(epoch: int, step: int = 0) -> dict[str, Any]:
    """Of a first trainer, which did not say what a checkpoint is of: it has the fewest parts."""
    loader = {"epoch": epoch, "step": step, "identity": {}}
    return {"epoch": epoch, "loader": loader, "model": {"weight": torch.arange(1000)}}


def save(folder: Path, name: str, epoch: int, step: int = 0) -> None:
    checkpoints.save(folder / name, state(epoch, step), folder / PREVIOUS if name == LAST else None)


def flip_a_bit(path: Path) -> None:
    """Of a tensor: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100, 105).numpy().tobytes())] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def full_disk(_: dict[str, Any], file: BinaryIO) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = {"model": {}, "weights": torch.randn(3), "rows": [{"loss": 1.5, "few": None}], "name": "resnet32"}
    checkpoints.save(tmp_path / LAST, saved)
    loaded = checkpoints.load(tmp_path / LAST)
    assert torch.equal(loaded.pop("weights"), saved.pop("weights"))
    assert loaded == saved


def test_a_write_that_fails_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, LAST, 1)
    save(tmp_path, LAST, 2)
    monkeypatch.setattr(checkpoints, "_write", full_disk)
    with pytest.raises(UserError, match=r"No space left.*as it was: last\.pt, previous\.pt\..*--resume"):
        save(tmp_path, LAST, 3)
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    assert checkpoints.newest(tmp_path).state["epoch"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_what_torch_makes_of_a_full_disk_is_explained(tmp_path: Path) -> None:
    (tmp_path / "last.pt.unfinished").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"can't be written .*No checkpoint was written yet"):
        save(tmp_path, LAST, 1)
    assert not list(tmp_path.iterdir())


class Interrupted(io.BytesIO):
    def write(self, _: Any) -> int:
        if self.tell() > 0:
            raise KeyboardInterrupt
        return super().write(b"some")


def test_ctrl_c_within_a_write_is_no_full_disk() -> None:
    with pytest.raises(KeyboardInterrupt):
        checkpoints._write({"model": {str(number): torch.ones(9) for number in range(9)}}, Interrupted())


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be written to .*file .*make it writable, then start again"):
        save(tmp_path / "file", LAST, 1)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    save(tmp_path, LAST, 1)
    save(tmp_path, MID_EPOCH, 1, step=7)
    assert checkpoints.newest(tmp_path).path.name == MID_EPOCH
    assert checkpoints.last_epoch(tmp_path).path.name == LAST
    save(tmp_path, LAST, 2)
    assert checkpoints.newest(tmp_path).path.name == LAST
    assert checkpoints.load(tmp_path / PREVIOUS)["epoch"] == 1


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, harm: Any) -> None:
    for epoch in (1, 2):
        save(tmp_path, LAST, epoch)
    harm(tmp_path / LAST)
    found = checkpoints.newest(tmp_path)
    assert (found.path.name, found.state["epoch"]) == (PREVIOUS, 1)
    assert found.damaged.keys() == {tmp_path / LAST}
    checkpoints.set_aside(found.damaged)
    save(tmp_path, LAST, 2)
    assert checkpoints.load(tmp_path / PREVIOUS)["epoch"] == 1  # not the damaged one
    assert (tmp_path / "last.pt.damaged").exists()


def test_a_kill_between_the_two_renames_loses_no_more_than_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, LAST, 1)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == LAST:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, LAST, 2)
    monkeypatch.undo()
    assert checkpoint_files.exist(tmp_path)
    assert checkpoints.newest(tmp_path).path.name == PREVIOUS
    checkpoints.clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PREVIOUS]


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_a_checkpoint_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, BEST)
    with pytest.raises(UserError, match=r"can't be read as a checkpoint"):
        checkpoints.load(Path(BEST))
    assert not Path("executed").exists()


def test_damage_and_absence_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*last\.pt"):
        checkpoints.newest(tmp_path)
    with pytest.raises(UserError, match=r"best\.pt can't be read .*no such file"):
        checkpoints.load(tmp_path / BEST)
    save(tmp_path, LAST, 1)
    cut_short(tmp_path / LAST)
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be used: last\.pt: "):
        checkpoints.newest(tmp_path)


def of_a_run(**changes: Any) -> dict[str, Any]:
    whole = {
        **state(2),
        "of": {},
        "class_counts": torch.ones(2),
        "compression": None,
        "objective": {},
        "optimizer": {"state": {}, "param_groups": []},
        "schedule": {},
        "scaler": {},
        "progress": None,
        "best_epoch": 1,
        "best_accuracy": 0.5,
        "history": [],
        "notes": [],
        "class_accuracy": None,
        "random_states": [],
    }
    return {name: part for name, part in {**whole, **changes}.items() if part is not ...}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1], "it holds a list"),
        ({}, "it lacks model, it lacks loader"),
        (of_a_run(loader=None), "its loader is a NoneType"),
        (of_a_run(loader={"epoch": 2}), "it lacks loader.step, it lacks loader.identity"),
        (of_a_run(optimizer=..., history={}), "it lacks optimizer, its history is a dict"),
        (of_a_run(optimizer={"state": []}), "its optimizer.state is a list, it lacks optimizer.param_groups"),
    ],
)
def test_what_is_no_checkpoint_of_a_run_gives_way_to_the_one_before(tmp_path: Path, content: Any, said: str) -> None:
    checkpoints.save(tmp_path / PREVIOUS, of_a_run())
    torch.save(content, tmp_path / LAST)
    found = checkpoints.newest(tmp_path)
    assert found.path.name == PREVIOUS
    assert said in found.damaged[tmp_path / LAST]
    with pytest.raises(UserError, match=r"last\.pt (can't be read as|is no) a? ?checkpoint"):
        checkpoints.load(tmp_path / LAST)
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be used: last\.pt: .* start anew"):
        checkpoints.newest(tmp_path)


def test_a_checkpoint_that_does_not_fit_counts_as_damaged(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save(tmp_path, LAST, epoch)
    found = checkpoints.newest(tmp_path, {tmp_path / LAST: "of another shape"})
    assert (found.path.name, found.damaged) == (PREVIOUS, {tmp_path / LAST: "of another shape"})
