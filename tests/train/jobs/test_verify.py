"""What verify.py finds in files, writes, compares and prints, and what stops it."""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from rcl_fast.train import verify
from rcl_fast.train.data import scan
from rcl_fast.train.data.manifest import Entry, default_file, read_manifest
from rcl_fast.train.jobs import verify as job

sys.path.insert(0, str(Path(__file__).parents[1]))
from bad_files import BAD, GOOD, SIZE, flip_a_byte, write_odd_files

TRAIN, VALIDATION, TEST = (f"ImageNet_LT_{part}.txt" for part in ("train", "val", "test"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file of bad_files.py; not to be written to."""
    folder = tmp_path_factory.mktemp("odd")
    write_odd_files(folder)
    return folder


@pytest.fixture
def data(odd: Path, tmp_path: Path) -> Path:
    """ImageNet-LT's lists, of four good files that a test may spoil."""
    paths = ["plain.jpg", "gray.jpg", "alpha.png", "picture.gif"]
    for path in paths:
        shutil.copy(odd / path, tmp_path)
    (tmp_path / TRAIN).write_text("".join(f"{path} {label}\n" for path, label in zip(paths, [0, 0, 0, 1], strict=True)))
    (tmp_path / VALIDATION).write_text("plain.jpg 0\npicture.gif 1\n")
    (tmp_path / TEST).write_text("plain.jpg 0\npicture.gif 1\n")
    return tmp_path


def run(data: Path, *arguments: str) -> int:
    """verify.py in this process: to start others takes seconds."""
    return verify.main(["--dataset", "imagenet_lt", "--data", str(data), "--workers", "0", *arguments])


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where an image is looked at."""
    monkeypatch.setattr(scan, "scan_file", lambda entry, data: pytest.fail("decoded before the error was told"))


class TestExamine:
    @pytest.mark.parametrize("path", GOOD)
    def test_an_unusual_image_is_as_good_as_any(self, odd: Path, path: str) -> None:
        content = (odd / path).read_bytes()
        assert scan.scan_file(Entry(path, "train", 3), odd) == Entry(
            path, "train", 3, *SIZE, *reversed(GOOD[path]), len(content), hashlib.sha256(content).hexdigest(), None
        )

    @pytest.mark.parametrize("path", BAD)
    def test_a_bad_file_is_named_with_its_cause(self, odd: Path, path: str) -> None:
        found = scan.scan_file(Entry(path, "test", 3), odd)
        assert (found.path, found.split, found.label) == (path, "test", 3)
        assert found.error is not None
        assert found.error.startswith(BAD[path])
        assert (found.sha256 is not None) == (odd / path).is_file()

    @pytest.mark.parametrize("path", ["nul\0.jpg", "plain.jpg/x.jpg", 300 * "x"])
    def test_a_path_that_cannot_be_is_bad(self, odd: Path, path: str) -> None:
        assert scan.scan_file(Entry(path, "train", 0), odd).error

    def test_an_absolute_path_needs_no_folder(self, odd: Path) -> None:
        assert scan.scan_file(Entry(str(odd / "plain.jpg"), "train", 0), Path("elsewhere")).error is None

    def test_flipped_bytes_show_in_the_hash_alone(self, data: Path) -> None:
        before = scan.scan_file(Entry("plain.jpg", "train", 0), data)
        flip_a_byte(data / "plain.jpg")
        after = scan.scan_file(Entry("plain.jpg", "train", 0), data)
        assert (after.bytes, after.error) == (before.bytes, None)
        assert after.sha256 != before.sha256


def test_all_that_is_listed_is_examined_once_by_processes(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK", 3)  # so that there is work for both
    for file in odd.iterdir():
        (tmp_path / file.name).symlink_to(file)
    paths = [*GOOD, *BAD]
    (tmp_path / TRAIN).write_text("".join(f"{path} 0\n" for path in paths) + "plain.jpg 1\n", encoding="utf-8")
    (tmp_path / VALIDATION).write_text("half.jpg 0\n")
    (tmp_path / TEST).write_text("plain.jpg 1\n")

    assert run(tmp_path, "--workers", "2") == 1

    lines = default_file(tmp_path).read_text().splitlines()
    assert len(lines) == len(paths) + 3
    entries = read_manifest("imagenet_lt", tmp_path).entries
    assert {path for path, entry in entries.items() if entry.error is None} == set(GOOD)
    assert {path for path, entry in entries.items() if entry.error is not None} == set(BAD)
    printed = capsys.readouterr().out
    for kind in ("missing", "empty", "no image, or of an unknown format", "truncated", "too many pixels", "damaged"):
        assert kind in printed
    assert f"{tmp_path}/half.jpg (ImageNet_LT_train.txt, line {paths.index('half.jpg') + 1}): OSError" in printed
    assert f"{tmp_path}/half.jpg (ImageNet_LT_val.txt, line 1)" in printed
    assert "--on-bad-image skip" in printed
    assert "validation has no image that decodes of" in printed


class TestCounts:
    def test_a_data_set_without_bad_files_has_status_0(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(data) == 0
        printed = capsys.readouterr().out
        assert "every image decodes" in printed
        assert f"manifest: {default_file(data)}" in printed
        assert "formats: JPEG RGB 3, GIF P 3, JPEG L 1, PNG RGBA 1" in printed

    def test_sizes_stand_beside_the_published_ones(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (data / "gray.jpg").write_bytes(b"")
        run(data)
        printed = capsys.readouterr().out
        assert "note: these lists are not the published ImageNet-LT: train 4 (published: 115,846)" in printed
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
        assert rows[:3] == [
            ["train", "4", "115,846", "1"],
            ["validation", "2", "20,000", "0"],
            ["test", "2", "50,000", "0"],
        ]

    def test_few_classes_are_counted_each_and_only_what_decodes(
        self, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for part, name, count in [("train", "ash", 3), ("train", "[oak]", 2), ("test", "ash", 1), ("test", "[oak]", 1)]:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                shutil.copy(odd / "plain.jpg", tmp_path / part / name / f"{i}.jpg")
        (tmp_path / "train" / "ash" / "3.jpg").write_bytes(b"")
        (tmp_path / "test" / "[oak]" / "0.jpg").write_bytes(b"")
        assert run(tmp_path, "--dataset", "folder") == 1
        printed = capsys.readouterr().out
        assert "│ ash   │     3 │    1 │" in printed
        assert "│ [oak] │     2 │    0 │" in printed
        assert "2 classes; training images that decode: 3 (ash) down to 2 ([oak])" in printed
        assert "test has no image that decodes of [oak]" in printed
        assert "published" not in printed
        assert read_manifest("folder", tmp_path).entries["train/[oak]/1.jpg"].label == 0

    def test_many_classes_are_summed_up(
        self, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(job, "CLASSES_SHOWN", 1)
        (data / TRAIN).write_text(101 * "plain.jpg 0\n" + 20 * "gray.jpg 1\n" + 19 * "gray.jpg 2\n" + "alpha.png 3\n")
        assert run(data) == 0
        printed = capsys.readouterr().out
        assert "│ many (> 100)            │       1 │    101 │" in printed
        assert "│ medium (20 to 100)      │       1 │     20 │" in printed
        assert "│ few (< 20)              │       2 │     20 │" in printed
        assert "4 classes; training images that decode: 101 (0) down to 1 (3)" in printed

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file name is Unicode")
    def test_a_name_that_is_no_utf_8_is_printed_and_kept(
        self, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for part in ("train", "test"):
            (tmp_path / part / "ash").mkdir(parents=True)
            shutil.copy(odd / "plain.jpg", tmp_path / part / "ash")
        name = os.fsdecode(b"\xff.jpg")
        (tmp_path / "test" / "ash" / name).touch()
        assert run(tmp_path, "--dataset", "folder") == 1
        assert f"the image {tmp_path}/test/ash/\\xff.jpg: the file is empty" in capsys.readouterr().out
        assert read_manifest("folder", tmp_path).entries[f"test/ash/{name}"].error == "the file is empty"

    def test_images_in_memory_need_no_manifest(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert verify.main(["--dataset", "digits_lt"]) == 0
        printed = capsys.readouterr().out
        assert "it needs no manifest" in printed
        assert "selected on validation (the data set's own)" in printed
        assert "│ train      │    383 │   0 │" in printed, "of the recipe's imbalance, as a run trains on them"
        assert "│ test       │    400 │   0 │" in printed


class TestCopies:
    """What stands in two places byte for byte: verify.py alone reads every byte."""

    @pytest.fixture
    def folder(self, odd: Path, tmp_path: Path) -> Path:
        for place, file in {
            "train/ash/1.jpg": "plain.jpg",
            "train/ash/2.png": "alpha.png",
            "train/oak/3.jpg": "gray.jpg",
            "val/ash/4.jpg": "cmyk.jpg",
            "test/ash/5.gif": "picture.gif",
        }.items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(odd / file, tmp_path / place)
        return tmp_path

    def verified(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert run(folder, "--dataset", "folder") == 0
        return capsys.readouterr().out

    def test_without_copies_nothing_is_said(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "byte for byte" not in self.verified(folder, capsys)

    @pytest.mark.parametrize("part", ["val", "test"])
    def test_images_that_are_trained_on_too(self, folder: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
        shutil.copy(folder / "train/ash/1.jpg", folder / part / "ash/copy.jpg")
        split = {"val": "validation"}.get(part, part)
        told = f"1 image of {split} also in train, byte for byte: {part}/ash/copy.jpg is train/ash/1.jpg"
        assert told in self.verified(folder, capsys)

    def test_images_to_validate_on_that_are_tested_too(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copy(folder / "val/ash/4.jpg", folder / "test/ash/copy.jpg")
        told = "1 image of test also in validation, byte for byte: test/ash/copy.jpg is val/ash/4.jpg"
        assert told in self.verified(folder, capsys)

    def test_one_image_in_two_classes(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copy(folder / "train/ash/1.jpg", folder / "train/oak/copy.jpg")
        shutil.copy(folder / "train/ash/1.jpg", folder / "train/ash/copy.jpg")
        printed = self.verified(folder, capsys)
        assert "1 image of train in two classes, byte for byte" in printed
        assert "train/oak/copy.jpg is train/ash/1.jpg: oak, ash" in printed


def test_what_a_run_would_refuse_is_told(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "ash").mkdir(parents=True)
        shutil.copy(odd / "plain.jpg", tmp_path / part / "ash")
    assert run(tmp_path, "--dataset", "folder") == 1
    assert "a run would refuse it: there is one class, ash: a classifier needs two" in capsys.readouterr().out


class TestSecondRun:
    def test_files_that_changed_are_gone_or_are_new_are_named(
        self, data: Path, odd: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(data)
        first = default_file(data).read_bytes()
        flip_a_byte(data / "plain.jpg")
        shutil.copy(odd / "palette.png", data)
        lines = (data / TRAIN).read_text().replace("alpha.png", "palette.png")
        (data / TRAIN).write_text(lines)
        capsys.readouterr()

        assert run(data) == 1  # every image decodes, but one is another
        printed = capsys.readouterr().out
        assert "every image decodes" in printed
        assert "since the earlier manifest: 1 changed, 1 gone, 1 new" in printed
        for what in ("changed: plain.jpg", "gone: alpha.png", "new: palette.png"):
            assert what in printed
        kept = default_file(data).with_name("rcl_fast_manifest.jsonl.earlier")
        assert kept.read_bytes() == first
        assert str(kept) in printed

        assert run(data) == 0
        assert "0 changed, 0 gone, 0 new" in capsys.readouterr().out
        assert kept.read_bytes() == first

    def test_what_is_no_manifest_is_not_replaced(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (data / "notes").write_text("dear diary\n")
        no_decoding(monkeypatch)
        with pytest.raises(SystemExit, match=r"notes, line 1, is none of a manifest"):
            run(data, "--manifest", str(data / "notes"))
        assert (data / "notes").read_text() == "dear diary\n"


class TestWhereTheManifestGoes:
    @pytest.mark.parametrize("place", ["nowhere/m.jsonl", "plain.jpg/m.jsonl", "."])
    def test_a_place_that_cannot_be_written_is_told_before_decoding(
        self, data: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        no_decoding(monkeypatch)
        with pytest.raises(SystemExit, match=r"can't be written to .*--manifest PATH"):
            run(data, "--manifest", str(data / place))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_folder_is_told_before_decoding(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        no_decoding(monkeypatch)
        data.chmod(0o555)
        try:
            with pytest.raises(SystemExit, match=r"can't be written to .*--manifest PATH"):
                run(data)
        finally:
            data.chmod(0o755)

    def test_elsewhere_leaves_the_data_folder_as_it_was(
        self, data: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "m.jsonl"
        before = {file: file.stat().st_mtime_ns for file in data.iterdir()}
        assert run(data, "--manifest", str(elsewhere)) == 0
        assert {file: file.stat().st_mtime_ns for file in data.iterdir()} == before
        assert "alpha.png" in read_manifest("imagenet_lt", data, elsewhere).entries
        assert list(elsewhere.parent.iterdir()) == [elsewhere]

    def test_a_disk_that_is_full_in_the_end_is_told(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(job, "write_manifest", full)
        with pytest.raises(SystemExit, match=r"can't be written to .*No space left.*--manifest PATH"):
            run(data)


class TestStopped:
    @pytest.fixture
    def interrupted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Ctrl-C at the third image."""
        looked = []

        def examine(entry: Entry, data: Path) -> Entry:
            looked.append(entry)
            if len(looked) == 3:
                raise KeyboardInterrupt
            return entry

        with monkeypatch.context() as patched:
            patched.setattr(scan, "scan_file", examine)
            yield

    def test_an_interrupt_writes_nothing(self, data: Path, interrupted: None) -> None:
        before = set(data.iterdir())
        with pytest.raises(SystemExit, match="interrupted: no manifest was written"):
            run(data)
        assert set(data.iterdir()) == before

    def test_an_interrupt_leaves_the_earlier_manifest(self, data: Path, request: pytest.FixtureRequest) -> None:
        run(data)
        before = {file: file.read_bytes() for file in data.iterdir()}
        request.getfixturevalue("interrupted")
        flip_a_byte(data / "plain.jpg")
        before[data / "plain.jpg"] = (data / "plain.jpg").read_bytes()
        with pytest.raises(SystemExit, match=rf"interrupted: {default_file(data)} is as it was"):
            run(data)
        assert {file: file.read_bytes() for file in data.iterdir()} == before

    def test_a_process_that_dies_is_told_with_where(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class DyingPool:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.stopped = False

            def map(self, look: Any, entries: list[Entry], chunksize: int) -> Iterator[Entry]:
                yield look(entries[0])
                raise BrokenProcessPool("terminated abruptly")

            def shutdown(self, cancel_futures: bool) -> None:
                self.stopped = True

        monkeypatch.setattr(scan, "ProcessPoolExecutor", DyingPool)
        monkeypatch.setattr(scan, "_processes", lambda: None)
        with pytest.raises(SystemExit, match=r"a process died.* from gray\.jpg on.*fewer --workers"):
            run(data, "--workers", "2")
        assert not default_file(data).exists()

    def test_missing_data_is_told_as_by_training(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"imagenet_lt: not found below(.|\n)*ImageNet_LT_train\.txt"):
            run(tmp_path)
        with pytest.raises(SystemExit, match="no data folder was given"):
            verify.main(["--dataset", "imagenet_lt"])

    def test_a_negative_number_of_processes_is_refused(self, data: Path) -> None:
        with pytest.raises(SystemExit, match="--workers must be at least 0, got -1"):
            run(data, "--workers", "-1")
