"""Image folders as people have them: links, copies, odd names, and everything that is wrong in one list."""

import os
import shutil
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcl_fast.train.data.datasets import Splits, load_splits
from rcl_fast.train.data.folder import image_folder
from rcl_fast.train.data.samples import RawDataset
from rcl_fast.train.errors import NotFound, UserError


def save_image(path: Path, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, color, color)).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """10 training images of ash and 3 of oak, a test image of each."""
    for name, count in (("ash", 10), ("oak", 3)):
        for i in range(count):
            save_image(tmp_path / "train" / name / f"{i}.jpg")
        save_image(tmp_path / "test" / name / "0.webp")
    return tmp_path


def noted(data: Path) -> tuple[RawDataset, str]:
    """The data set, and all that is said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raw = image_folder(data)
    return raw, "\n".join(str(warning.message) for warning in caught)


def refused(data: Path) -> str:
    with pytest.raises(UserError) as error:
        image_folder(data)
    return str(error.value)


class TestPlainFolders:
    def test_a_good_folder_is_used_as_it_is_without_a_word(self, data: Path) -> None:
        raw, said = noted(data)
        assert said == ""
        assert np.bincount(raw.train.labels).tolist() == [10, 3]
        assert raw.class_names == ["ash", "oak"]
        assert raw.validation is None
        assert raw.train.labels.tolist() == [path.count("oak") for path in raw.train.images]

    def test_images_come_by_folder_and_then_by_name(self, data: Path) -> None:
        """torchvision's order, in which runs of earlier versions were."""
        for path in ("oak/10.jpg", "oak/A.JPG", "oak/b/1.jpg", "oak/b c/1.jpg", "oak/b/z/1.jpg"):
            save_image(data / "train" / path)
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        expected = make_dataset(str(data / "train"), {"ash": 0, "oak": 1}, extensions=IMG_EXTENSIONS)
        assert image_folder(data).train.images == [path for path, _ in expected]

    def test_the_seed_changes_only_what_is_held_out(self, data: Path) -> None:
        one, two = (load_splits("folder", data, seed=seed, validation_fraction=0.3) for seed in (1, 2))
        assert one.test.images == two.test.images
        assert one.validation.images != two.validation.images
        whole = load_splits("folder", data, validate_on="test").train
        for splits in (one, two):
            assert sorted([*splits.train.images, *splits.validation.images]) == sorted(whole.images)

    def test_what_is_held_out_is_said(self, data: Path) -> None:
        splits = load_splits("folder", data, imbalance=100)
        assert splits.class_counts.tolist() == [9, 2]
        assert splits.selected_on == "validation (10 % of the training set, held out)"

    def test_nothing_to_hold_out_is_refused(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            for name in ("ash", "oak"):
                save_image(tmp_path / part / name / "0.png")
        with pytest.raises(ValueError, match=r"no class has two training images.*--validate-on test"):
            load_splits("folder", tmp_path)


class TestValidationFolder:
    def splits(self, data: Path) -> Splits:
        save_image(data / "val" / "ash" / "0.jpg")
        save_image(data / "val" / "oak" / "0.jpg")
        return load_splits("folder", data)

    def test_val_is_the_validation_set(self, data: Path) -> None:
        splits = self.splits(data)
        assert splits.class_counts.tolist() == [10, 3], "nothing is held out"
        assert splits.validation.images == [str(data / "val/ash/0.jpg"), str(data / "val/oak/0.jpg")]
        assert splits.validation.labels.tolist() == [0, 1]
        assert splits.selected_on == "validation (the data set's own)"

    def test_an_empty_one_is_named(self, data: Path) -> None:
        (data / "val" / "ash").mkdir(parents=True)
        assert f"{data / 'val'} has no image; remove it, and a share of train is held out" in refused(data)

    @pytest.mark.parametrize("name", ["valid", "validation", "Val"])
    def test_another_name_for_it_is_told(self, data: Path, name: str) -> None:
        (data / name).mkdir()
        assert f"{data / name} is not read; to validate on it, rename it to val" in noted(data)[1]

    @pytest.mark.parametrize("name", ["val", "valid"])
    def test_without_a_test_set_it_may_become_one(self, data: Path, name: str) -> None:
        (data / "test").rename(data / name)
        with pytest.raises(NotFound, match=rf"(?s)test/CLASS/IMAGE.*To test on {data / name}, rename it to test"):
            image_folder(data)


class TestEachRealFileOnce:
    @pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
    def test_a_link_to_a_folder_above_is_not_followed(self, data: Path, target: str) -> None:
        (data / "train/oak/up").symlink_to(target)
        raw, said = noted(data)
        assert np.bincount(raw.train.labels).tolist() == [10, 3]
        assert f"not followed: {data / 'train/oak/up'}" in said

    def test_a_link_to_a_folder_beside_counts_it_once(self, data: Path) -> None:
        save_image(data / "train/oak/z/1.jpg")
        (data / "train/oak/a").symlink_to("z")
        raw, said = noted(data)
        assert str(data / "train/oak/z/1.jpg") in raw.train.images
        assert np.bincount(raw.train.labels).tolist() == [10, 4]
        assert f"not followed: {data / 'train/oak/a'}" in said

    def test_links_to_images_elsewhere_are_images(self, data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        save_image(elsewhere / "elm" / "1.png")
        (data / "train/elm").symlink_to(elsewhere / "elm")
        (data / "train/oak/1.png").symlink_to(elsewhere / "elm/1.png")
        assert "1 file in two classes at once" in refused(data)
        (data / "train/elm").unlink()
        raw, said = noted(data)
        assert np.bincount(raw.train.labels).tolist() == [10, 4]
        assert said == ""

    def test_further_names_of_a_file_are_left_out(self, data: Path) -> None:
        (data / "train/oak/0 again.jpg").symlink_to("0.jpg")
        os.link(data / "train/oak/1.jpg", data / "train/oak/1 again.jpg")
        raw, said = noted(data)
        assert np.bincount(raw.train.labels).tolist() == [10, 3]
        assert str(data / "train/oak/0.jpg") in raw.train.images, "the file, and not the link to it"
        assert "0 again.jpg" in said

    def test_a_class_that_is_a_link_to_another_is_refused(self, data: Path) -> None:
        (data / "train/elm").symlink_to("oak")
        assert f"{data / 'train/oak/0.jpg'} is {data / 'train/elm/0.jpg'}" in refused(data)
        assert "has 3 files in two classes at once, by links" in refused(data)

    def test_a_test_set_of_links_to_training_images_is_told(self, data: Path) -> None:
        (data / "test/oak/0.jpg").symlink_to(data / "train/oak/0.jpg")
        told = f"in {data / 'train'} and in {data / 'test'}, by links: 1 file: {data / 'test/oak/0.jpg'} is"
        assert told in noted(data)[1]

    def test_a_validation_set_that_is_the_test_set_is_told(self, data: Path) -> None:
        (data / "val").symlink_to("test")
        assert f"in {data / 'val'} and in {data / 'test'}, by links: 2 files" in noted(data)[1]

    def test_a_link_to_nothing_stays_an_image_for_the_loader_to_name(self, data: Path) -> None:
        (data / "train/oak/gone.jpg").symlink_to("nowhere")
        (data / "train/oak/round.jpg").symlink_to("round.jpg")
        assert np.bincount(noted(data)[0].train.labels).tolist() == [10, 5]


class TestLinksToNothing:
    """A disk that is not there would take a class, or the validation set, with it."""

    @pytest.mark.parametrize("place", ["val", "train/elm", "train/oak/more"])
    def test_they_are_named(self, data: Path, place: str) -> None:
        (data / place).symlink_to("/nowhere/at all")
        told = "can't be listed (No such file or directory)" if place == "val" else "is a link to nothing"
        assert f"{data / place} {told}" in refused(data)

    def test_a_file_in_place_of_a_folder(self, data: Path) -> None:
        (data / "val").touch()
        assert f"{data / 'val'} can't be listed (Not a directory)" in refused(data)


class TestWhatIsLeftOut:
    @pytest.mark.parametrize(
        "folder", ["train/oak/.ipynb_checkpoints", "train/.ipynb_checkpoints", "train/oak/@eaDir", "train/__MACOSX"]
    )
    def test_hidden_folders(self, data: Path, folder: str) -> None:
        shutil.copytree(data / "train/oak", data / folder)
        raw, said = noted(data)
        assert np.bincount(raw.train.labels).tolist() == [10, 3]
        assert raw.class_names == ["ash", "oak"]
        assert f"hidden folders are left out: {data / folder}" in said

    def test_hidden_files(self, data: Path) -> None:
        save_image(data / "train/oak/._0.jpg")
        assert np.bincount(noted(data)[0].train.labels).tolist() == [10, 3]

    @pytest.mark.parametrize("suffix", [".gif", ".jfif", ".JPE", ".TIF"])
    def test_images_by_another_known_suffix_count(self, data: Path, suffix: str) -> None:
        (data / "train/oak/0.jpg").rename(data / f"train/oak/0{suffix}")
        raw, said = noted(data)
        assert np.bincount(raw.train.labels).tolist() == [10, 3]
        assert said == ""

    def test_other_suffixes_are_counted_with_the_package_that_reads_them(self, data: Path) -> None:
        for name in ("1.heic", "2.HEIC", "notes.txt", "README", "3.cr2"):
            (data / "train/oak" / name).touch()
        said = noted(data)[1]
        assert "2 .heic (pillow-heif reads them)" in said
        assert "1 .cr2 (rawpy reads them)" in said
        assert "1 .txt" in said
        assert "1 without a suffix" in said

    def test_images_of_no_class(self, data: Path) -> None:
        save_image(data / "train/loose.jpg")
        assert f"images beside the folders of the classes are left out: {data / 'train/loose.jpg'}" in noted(data)[1]

    def test_a_class_that_is_never_tested(self, data: Path) -> None:
        save_image(data / "train/elm/0.png")
        raw, said = noted(data)
        assert f"{data / 'test'} has no images of: elm" in said
        assert raw.class_names == ["ash", "elm", "oak"]
        assert raw.test.labels.tolist() == [0, 2]


class TestNames:
    COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "crème brûlée") for form in ("NFC", "NFD"))

    def test_one_name_in_two_forms_is_one_class(self, data: Path) -> None:
        save_image(data / "train" / self.DECOMPOSED / "0.jpg")
        save_image(data / "test" / self.COMPOSED / "0.jpg")
        raw = image_folder(data)
        assert raw.class_names == ["ash", self.COMPOSED, "oak"]
        assert raw.test.labels.tolist() == [0, 1, 2]
        assert Path(raw.train.images[10]).is_file()

    def test_both_forms_side_by_side_are_refused(self, data: Path) -> None:
        for name in (self.DECOMPOSED, self.COMPOSED):
            save_image(data / "train" / name / "0.jpg")
            save_image(data / "test" / name / "0.jpg")
        told = refused(data)
        assert f"{data / 'train'} has two folders for class {self.COMPOSED}" in told
        assert f"{data / 'test'} has two folders for class {self.COMPOSED}" in told

    @pytest.mark.parametrize("other", ["Oak", "oak ", " OAK"])
    def test_names_that_are_almost_the_same_are_told(self, data: Path, other: str) -> None:
        (data / "test/oak").rename(data / "test" / other)
        told = refused(data)
        assert (
            f"{data / 'test'} has 1 class that {data / 'train'} lacks: {other if other == 'Oak' else repr(other)}"
            in told
        )
        assert f"{data / 'train'} has classes of almost these names: oak" in told

    def test_controls_in_a_name_are_escaped(self, data: Path) -> None:
        for part in ("train", "test"):
            save_image(data / part / "b\x1b[31m\n" / "0.png")
        assert image_folder(data).class_names == ["ash", "b\\x1b[31m\\x0a", "oak"]

    def test_a_name_that_is_no_unicode_is_escaped(self, data: Path) -> None:
        name = os.fsdecode(b"caf\xe9")
        for part in ("train", "test"):
            save_image(data / part / "x.jpg").rename(data / part / "ash" / f"{name}.jpg")
            save_image(data / part / name / "0.jpg")
        raw = image_folder(data)
        assert raw.class_names == ["ash", "caf\\xe9", "oak"]
        assert all(Path(path).is_file() for path in raw.train.images)


def test_everything_that_is_wrong_is_in_one_list(data: Path) -> None:
    (data / "train/elm").mkdir()
    for number in range(2):
        save_image(data / "test/yew" / f"{number}.png")
        (data / "train/fir").mkdir(exist_ok=True)
        (data / f"train/fir/{number}.heic").touch()
    (data / "train/ash2").symlink_to("ash")
    (data / "val").mkdir()
    save_image(data / "val/1.jpg")
    assert refused(data).splitlines() == [
        f"{data}: this can't be trained on as it is:",
        f"  {data}/train has 10 files in two classes at once, by links: "
        + ", ".join(f"{data}/train/ash2/{i}.jpg is {data}/train/ash/{i}.jpg" for i in range(5))
        + " and 5 more",
        f"  {data}/train has 2 classes without an image: elm (empty), fir (left out: 2 .heic (pillow-heif reads them))",
        f"  {data}/val has 1 image of no class: put those of each class into a folder of its name",
        f"  {data}/test has 1 class that {data}/train lacks: yew (2 images)",
    ]


def test_a_folder_that_may_not_be_read_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def forbidden(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("oak"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert f"{data}/train/oak can't be listed (Permission denied)" in refused(data)


def test_a_pipe_is_named_and_not_waited_for(data: Path) -> None:
    os.mkfifo(data / "train/oak/pipe.jpg")
    assert f"{data}/train/oak/pipe.jpg is a pipe or a device, not a file" in refused(data)


def test_missing_folders_are_named(data: Path) -> None:
    (data / "test").rename(data / "tests")
    with pytest.raises(NotFound, match=r"(?s)folder: not found below.*test/CLASS/IMAGE"):
        image_folder(data)


@pytest.mark.parametrize(
    ("moved", "given", "advice"),
    [
        ({"train": "Train"}, "", "{data}/Train is to be called train"),
        ({"train": "training", "test": "testing"}, "", "{data}/testing is to be called test"),
        ({}, "train", "--data takes the folder above: {data}"),
        ({"train": "inner/train", "test": "inner/test"}, "", "{data}/inner has such folders: --data {data}/inner"),
        ({}, "nowhere", "not found below {data}/nowhere, which is not there"),
        ({}, "train/oak/0.jpg", "not found below {data}/train/oak/0.jpg, which is a file"),
    ],
)
def test_what_may_have_been_meant(data: Path, moved: dict[str, str], given: str, advice: str) -> None:
    for before, after in moved.items():
        (data / after).parent.mkdir(exist_ok=True)
        (data / before).rename(data / after)
    with pytest.raises(NotFound) as error:
        image_folder(data / given)
    assert advice.format(data=data) in str(error.value)


def test_many_folders_in_a_class_take_no_time(data: Path) -> None:
    for number in range(3000):
        (data / f"train/oak/{number}").mkdir()
    assert len(image_folder(data).train) == 13


def test_no_folder_at_all_and_no_class_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no data folder was given"):
        image_folder(None)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    assert f"{tmp_path}/train has no image\n" in refused(tmp_path)
