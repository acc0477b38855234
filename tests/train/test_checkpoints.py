"""Checkpoints: atomic, never executed, and clear about damage."""

import os
from pathlib import Path

import pytest
import torch

from rcl_fast.train import checkpoints


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"epoch": 1})

    def full_disk(state: object, file: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, {"epoch": 2})
    assert checkpoints.load(path) == {"epoch": 1}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = {"weights": torch.randn(3), "rows": [{"loss": 1.5, "few": None}], "name": "resnet32"}
    checkpoints.save(tmp_path / "last.pt", state)
    loaded = checkpoints.load(tmp_path / "last.pt")
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))
    assert loaded == state


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_a_checkpoint_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "last.pt")
    with pytest.raises(SystemExit, match=r"can't be read as a checkpoint"):
        checkpoints.load(Path("last.pt"))
    assert not Path("executed").exists()


def test_damage_and_absence_are_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(SystemExit, match=r"no checkpoint .*last\.pt"):
        checkpoints.load(path)
    checkpoints.save(path, {"weights": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SystemExit, match=r"last\.pt can't be read"):
        checkpoints.load(path)
