"""The manifest on disk, two of them compared, and training by one."""

from pathlib import Path

import numpy as np
import pytest

from rcl_fast.train.data.manifest import (
    Entry,
    Manifest,
    bad_indices,
    changes,
    check_readable,
    default_file,
    read_manifest,
    relative,
    without_bad,
    write_manifest,
)
from rcl_fast.train.data.samples import BadImage, Samples
from rcl_fast.train.runtime.wording import SHOWN

DATA = Path("data")
NAMES = ["ash", "oak"]


def entry(path: str, error: str | None = None, sha256: str | None = "0" * 64) -> Entry:
    return Entry(path, "train", 0, 48, 32, "RGB", "JPEG", 1234, sha256, error)


def manifest(*entries: Entry, data: Path = DATA) -> Manifest:
    return Manifest(default_file(data), data, {one.path: one for one in entries}, "python train/verify.py ...")


def samples(*paths: str, labels: list[int] | None = None, data: Path = DATA) -> Samples:
    """Each path listed below `data`, as the loaders do it."""
    listed = [f"{data}/{path}" for path in paths]
    origins = [f"train.txt, line {number}" for number in range(1, len(paths) + 1)]
    return Samples(listed, np.array(labels or [0] * len(paths), np.int64), origins)


IN_MEMORY = Samples(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))


class TestOnDisk:
    def test_every_field_survives_and_every_file_name(self, tmp_path: Path) -> None:
        entries = [
            entry("a b/größe, 猫.jpg"),
            entry('"new\nline".jpg', error="OSError: 'quoted', and\nbroken"),
            entry("no utf-8: \udcff\udcfe.jpg"),
            Entry("missing.jpg", "test", 7, error="there is no such file"),
        ]
        write_manifest(default_file(tmp_path), entries)
        found = read_manifest("folder", tmp_path)
        assert list(found.entries.values()) == entries
        assert list(found.entries) == [one.path for one in entries]
        assert len(default_file(tmp_path).read_text().splitlines()) == len(entries)

    def test_where_there_is_none_the_command_that_makes_it_is_told(self, tmp_path: Path) -> None:
        data = tmp_path / "my images"
        with pytest.raises(FileNotFoundError) as error:
            read_manifest("imagenet_lt", data)
        assert f"no manifest {data / 'rcl_fast_manifest.jsonl'}" in str(error.value)
        assert f"python train/verify.py --dataset imagenet_lt --data '{data}'" in str(error.value)
        assert "--manifest" not in str(error.value)
        with pytest.raises(FileNotFoundError, match=r"no manifest there\.jsonl(.|\n)*--manifest there\.jsonl"):
            read_manifest("imagenet_lt", data, Path("there.jsonl"))

    @pytest.mark.parametrize(
        "line", ["path,label", "[1, 2]", "3", '{"path": "a.jpg"}', '{"color": 1}', '{"pa', "\udcff"]
    )
    def test_a_line_that_is_no_entry_is_named(self, tmp_path: Path, line: str) -> None:
        file = default_file(tmp_path)
        write_manifest(file, [entry("a.jpg")])
        file.write_bytes(file.read_bytes() + line.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=rf"{file}, line 2, is none of a manifest"):
            read_manifest("folder", tmp_path)


@pytest.mark.parametrize(
    ("path", "data", "expected"),
    [
        ("/d/a/1.jpg", "/d", "a/1.jpg"),
        ("d/a/1.jpg", "d", "a/1.jpg"),
        ("/elsewhere/1.jpg", "/d", "/elsewhere/1.jpg"),
        ("/data2/1.jpg", "/data", "/data2/1.jpg"),
        ("./a/1.jpg", ".", "a/1.jpg"),  # as the lists give it
        ("a/1.jpg", ".", "a/1.jpg"),  # as a folder gives it
    ],
)
def test_paths_are_kept_below_the_data_folder(path: str, data: str, expected: str) -> None:
    assert relative(path, Path(data)) == expected


def test_changes_are_told_by_the_hash() -> None:
    before = manifest(
        entry("same", sha256="1"),
        entry("changed", sha256="2"),
        entry("changed and bad", sha256="3"),
        entry("now missing", sha256="4"),
        entry("no longer listed", sha256="5"),
        entry("was missing", sha256=None),
        entry("missing as before", sha256=None),
    )
    now = [
        entry("same", sha256="1"),
        entry("changed", sha256="22"),
        entry("changed and bad", sha256="33", error="OSError: truncated"),
        entry("now missing", sha256=None),
        entry("was missing", sha256="6"),
        entry("missing as before", sha256=None),
        entry("newly listed", sha256="7"),
    ]
    found = changes(before, now)
    assert found.changed == ["changed", "changed and bad"]
    assert found.gone == ["now missing", "no longer listed"]
    assert found.new == ["was missing", "newly listed"]


class TestCheckReadable:
    def test_bad_samples_are_named_with_their_lines_and_what_to_do(self) -> None:
        known = manifest(entry("a.jpg"), entry("b.jpg", error="the file is empty"))
        with pytest.raises(BadImage) as error:
            check_readable({"train": samples("a.jpg", "b.jpg")}, known)
        assert "1 of 2 images are bad" in str(error.value)
        assert "train: the image data/b.jpg (train.txt, line 2): the file is empty" in str(error.value)
        assert "a.jpg (" not in str(error.value)
        assert "--on-bad-image skip" in str(error.value)
        assert known.made_with in str(error.value)

    def test_of_many_the_first_are_named_and_the_rest_counted(self) -> None:
        paths = [f"{i}.jpg" for i in range(SHOWN + 3)]
        with pytest.raises(BadImage, match=r"(?s)0\.jpg.*4\.jpg.*and 3 more") as error:
            check_readable({"train": samples(*paths)}, manifest(*(entry(path, error="bad") for path in paths)))
        assert "5.jpg" not in str(error.value)

    def test_bad_files_that_are_no_samples_and_samples_it_has_not_are_let_pass(self) -> None:
        check_readable({"train": samples("a.jpg", "new.jpg")}, manifest(entry("a.jpg"), entry("b.jpg", error="bad")))

    def test_images_in_memory_pass(self) -> None:
        check_readable({"train": IN_MEMORY}, manifest(entry("b.jpg", error="bad")))


class TestSkipping:
    def test_bad_samples_are_left_out_and_told(self) -> None:
        listed = samples("a.jpg", "b.jpg", "c.jpg", "d.jpg", labels=[1, 0, 1, 0])
        known = manifest(entry("d.jpg"), entry("a.jpg", error="bad"), entry("b.jpg"), entry("c.jpg"))
        assert bad_indices(listed, known).tolist() == [0]
        kept, left_out = without_bad(listed, known, NAMES)
        assert kept.images == ["data/b.jpg", "data/c.jpg", "data/d.jpg"]
        assert kept.labels.tolist() == [0, 1, 0]
        assert kept.origins == ["train.txt, line 2", "train.txt, line 3", "train.txt, line 4"]
        assert left_out == ["the image data/a.jpg (train.txt, line 1): bad"]

    def test_without_bad_ones_the_samples_stay_as_they_are(self) -> None:
        listed = samples("a.jpg")
        kept, left_out = without_bad(listed, manifest(entry("a.jpg")), NAMES)
        assert kept is listed
        assert left_out == []

    def test_a_folder_that_has_moved_is_known_by_its_manifest(self) -> None:
        moved = Path("/mnt/elsewhere")
        known = Manifest(Path("m.jsonl"), moved, manifest(entry("a.jpg"), entry("b.jpg", error="bad")).entries, "")
        assert bad_indices(samples("a.jpg", "b.jpg", data=moved), known).tolist() == [1]

    def test_a_sample_that_the_manifest_has_not_is_named(self) -> None:
        known = manifest(entry("a.jpg", error="bad"), entry("b.jpg"))
        with pytest.raises(ValueError, match=r"does not have the image data/c\.jpg \(train\.txt, line 2\)") as error:
            without_bad(samples("a.jpg", "c.jpg", "d.jpg"), known, NAMES)
        assert str(known.file) in str(error.value)
        assert known.made_with in str(error.value)

    def test_a_class_that_loses_all_its_images_is_named(self) -> None:
        listed = samples("a.jpg", "b.jpg", "c.jpg", labels=[0, 1, 1])
        known = manifest(entry("a.jpg"), entry("b.jpg", error="bad"), entry("c.jpg", error="bad"))
        with pytest.raises(ValueError, match=r"every image of class 'oak' is bad, such as the image data/b\.jpg"):
            without_bad(listed, known, NAMES)

    def test_a_class_that_the_samples_never_had_is_not_missed(self) -> None:
        kept, _ = without_bad(samples("a.jpg", "b.jpg"), manifest(entry("a.jpg"), entry("b.jpg", error="bad")), NAMES)
        assert len(kept) == 1

    def test_images_in_memory_are_all_kept(self) -> None:
        assert without_bad(IN_MEMORY, manifest(entry("b.jpg", error="bad")), NAMES) == (IN_MEMORY, [])
