"""What a finished run leaves: whether all is there, and that what is damaged is named."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rcl_fast.train import run
from rcl_fast.train.config import recipe
from rcl_fast.train.errors import UserError
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoint_files, result_files, status

EPOCHS = 60  # the recipe's


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder as a finished run leaves it, as far as a look at its files goes."""
    (tmp_path / "config.json").write_text(json.dumps(recipe("digits_lt", "bcl_rcl").to_dict()))
    figures = {"balanced_accuracy": 0.8, "last_epoch": EPOCHS, "interrupted": False}
    (tmp_path / result_files.METRICS).write_text(json.dumps(figures))
    (tmp_path / result_files.HISTORY).write_text('{"balanced_accuracy": 0.5}\n' * EPOCHS)
    for name in (result_files.PER_CLASS, result_files.REPORT):
        (tmp_path / name).touch()
    for name in (checkpoint_files.LAST, checkpoint_files.BEST):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("data", b"weights")
    status.write(tmp_path, "finished")
    return tmp_path


def test_a_finished_run_is_not_begun_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    monkeypatch.setattr(run, "_train", lambda _: pytest.fail("it trains"))
    run.main(["--resume", str(finished)])
    said = capsys.readouterr().out
    assert "is finished: nothing is left to do" in said
    assert str(finished / "report.html") in said
    monkeypatch.setenv("RANK", "1")
    run.main(["--resume", str(finished)])
    assert capsys.readouterr().out == ""
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"weights", b"weighty"))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("report.html", Path.unlink),
        ("per_class.csv", Path.unlink),
        ("metrics.json", Path.unlink),
        ("metrics.json", lambda path: path.write_text("{")),
        ("metrics.json", lambda path: path.write_text('{"balanced_accuracy": 0.8, "last_epoch": 60}')),
        ("metrics.json", lambda path: path.write_text(path.read_text().replace("60", "59"))),
        ("metrics.jsonl", lambda path: path.write_text(path.read_text()[:-5])),
        ("metrics.jsonl", lambda path: path.write_text(path.read_text().splitlines()[0])),
        ("last.pt", flipped),
        ("best.pt", lambda path: path.write_bytes(b"")),
        ("status.json", lambda path: status.write(path.parent, "failed")),
        ("status.json", lambda path: path.write_text("[]")),
    ],
)
def test_what_is_missing_or_damaged_is_made_anew(finished: Path, name: str, harm: Any) -> None:
    assert result_files.nothing_is_left(finished, EPOCHS)
    harm(finished / name)
    assert not result_files.nothing_is_left(finished, EPOCHS)


def test_a_run_whose_checkpoints_were_removed_is_finished(finished: Path) -> None:
    for path in finished.glob("*.pt"):
        path.unlink()
    assert result_files.nothing_is_left(finished, EPOCHS)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"{}", b'{"balanced_accuracy": "x"}', b"\xff"])
def test_a_damaged_file_of_figures_is_named(tmp_path: Path, content: bytes) -> None:
    assert result_files.read_metrics(tmp_path) == {}
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(UserError, match=r"/metrics\.json is damaged \("):
        result_files.read_metrics(tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl can't be read"):
        result_files.read_history(tmp_path)
    for text, said in (
        ('{"balanced_accuracy": 0.5}\n{"bal', r"metrics\.jsonl, line 2, is damaged"),
        ("[1]\n", r"metrics\.jsonl, line 1, is damaged \(it holds \[1\]"),
        ("", "metrics\\.jsonl is damaged"),
        ('{"loss": 1}\n', "metrics\\.jsonl is damaged"),
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=said):
            result_files.read_history(tmp_path)


def test_the_names_are_those_that_a_run_writes() -> None:
    assert (results.METRICS, results.PER_CLASS, results.REPORT) == ("metrics.json", "per_class.csv", "report.html")
