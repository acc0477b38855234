import hashlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcl_fast.train.data.cifar import CIFARS, Cifar
from rcl_fast.train.data.datasets import DATASETS, BadImage, Splits, load_splits, open_image
from rcl_fast.train.data.digits import digits_lt
from rcl_fast.train.data.samples import Samples
from rcl_fast.train.errors import NotFound

Lists = Callable[..., Path]


def save_image(path: Path, color: int | tuple[int, int, int] = 0, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (color, color, color) if isinstance(color, int) else color
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def imagenet(tmp_path: Path) -> Lists:
    """Writes small ImageNet-LT lists; what is not given has one image of each of two classes."""

    def write(**lists: str) -> Path:
        for part in ("train", "val", "test"):
            text = lists.get(part, f"{part}/cat/1.jpg 0\n{part}/dog/1.jpg 1\n")
            (tmp_path / f"ImageNet_LT_{part}.txt").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def load(name: str, data: Path, **options: Any) -> Splits:
    """load_splits without the warning that the tiny lists are not the published ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_splits(name, data, **options)


def test_datasets_are_known_by_these_names() -> None:
    assert set(DATASETS) == {
        "digits_lt",
        "cifar10_lt",
        "cifar100_lt",
        "imagenet_lt",
        "places_lt",
        "inaturalist18",
        "folder",
    }
    with pytest.raises(ValueError, match=r"unknown data set 'mnist'.*digits_lt"):
        load_splits("mnist")


class TestDigits:
    def test_training_is_long_tailed_and_the_test_set_balanced(self) -> None:
        splits = load_splits("digits_lt", imbalance=10, validate_on="test")
        assert splits.class_counts[0] // 10 == splits.class_counts[-1]
        assert (np.diff(splits.class_counts) < 0).all()
        assert np.bincount(splits.test.labels).tolist() == [40] * 10
        assert splits.train.images.shape == (len(splits.train), 8, 8, 3)
        assert splits.train.images.dtype == np.uint8
        assert splits.train.images.max() == 255
        assert splits.class_names == list("0123456789")

    def test_no_test_image_is_trained_on(self) -> None:
        published = digits_lt(1, "exponential")
        assert len(published.train) == 10 * (174 - 60)  # 174 images of the rarest digit
        train = {image.tobytes() for image in published.train.images}
        assert not train & {image.tobytes() for image in published.test.images}

    def test_validation_is_balanced_and_its_own(self) -> None:
        splits = load_splits("digits_lt", imbalance=20)
        assert np.bincount(splits.validation.labels).tolist() == [20] * 10
        assert splits.selected_on == "validation (the data set's own)"
        rest = {image.tobytes() for part in (splits.train, splits.test) for image in part.images}
        assert not rest & {image.tobytes() for image in splits.validation.images}

    def test_validating_on_test_holds_nothing_out(self) -> None:
        splits = load_splits("digits_lt", validate_on="test")
        assert splits.validation is splits.test
        assert splits.selected_on == "test (as the literature does)"


class TestCifarFolder:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CIFAR-10 with 3 classes of 4 images."""
        monkeypatch.setitem(CIFARS, "cifar10_lt", Cifar(CIFARS["cifar10_lt"].torchvision, 3, 4))

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        """4, 2 and 2 training images, enough for an imbalance of 2.5 or more, each of its own colour."""
        for label, (name, count) in enumerate([("airplane", 4), ("bird", 2), ("cat", 2)]):
            for rank in range(count):
                save_image(tmp_path / "train" / name / f"{rank:04}.png", (50 * label, rank, 0))
            save_image(tmp_path / "test" / name / "0000.png", (50 * label, 0, 255))
        return tmp_path

    def test_the_first_ranks_are_read_into_memory(self, data: Path) -> None:
        splits = load_splits("cifar10_lt", data, imbalance=4, validate_on="test")
        assert splits.train.images.shape == (7, 32, 32, 3)
        assert splits.class_counts.tolist() == [4, 2, 1]
        assert splits.class_names == ["airplane", "bird", "cat"]
        colors = splits.train.images[:, 0, 0].tolist()
        assert colors == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 3, 0], [50, 0, 0], [50, 1, 0], [100, 0, 0]]
        assert splits.test.images[:, 31, 31].tolist() == [[0, 0, 255], [50, 0, 255], [100, 0, 255]]
        assert open_image(splits.train, 5).getpixel((3, 3)) == (50, 1, 0)

    def test_a_tail_too_short_for_the_imbalance_is_refused(self, data: Path) -> None:
        with pytest.raises(ValueError, match=r"'bird' has 2 and 3 are needed.*larger imbalance"):
            load_splits("cifar10_lt", data, imbalance=1.5)

    def test_another_number_of_classes_is_refused(self, data: Path) -> None:
        for part in ("train", "test"):
            save_image(data / part / "deer" / "0000.png")
        with pytest.raises(ValueError, match=r"cifar10_lt has 3 classes, and .*train has 4"):
            load_splits("cifar10_lt", data)

    def test_a_damaged_image_is_named(self, data: Path) -> None:
        path = data / "train" / "airplane" / "0000.png"
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(BadImage, match=r"train/airplane/0000\.png"):
            load_splits("cifar10_lt", data)

    def test_an_image_of_another_size_is_named(self, data: Path) -> None:
        path = save_image(data / "test" / "cat" / "0000.png", size=(16, 24))
        with pytest.raises(BadImage, match=f"{path} is 16x24"):
            load_splits("cifar10_lt", data)


class TestCifarFiles:
    @pytest.fixture
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """CIFAR-100's own files, with 2 classes of 4 training images in mixed order."""
        base = tmp_path / "cifar-100-python"
        base.mkdir()
        original = CIFARS["cifar100_lt"].torchvision

        def write(file: str, labels: list[int]) -> list[str]:
            pixels = np.arange(len(labels), dtype=np.uint8)[:, None].repeat(3072, axis=1)
            content = pickle.dumps({"data": pixels, "fine_labels": labels})
            (base / file).write_bytes(content)
            return [file, hashlib.md5(content).hexdigest()]

        monkeypatch.setattr(original, "train_list", [write("train", [1, 0, 1, 0, 0, 1, 0, 1])])
        monkeypatch.setattr(original, "test_list", [write("test", [1, 0])])
        meta = pickle.dumps({"fine_label_names": ["apple", "bear"]})
        (base / "meta").write_bytes(meta)
        monkeypatch.setitem(original.meta, "md5", hashlib.md5(meta).hexdigest())
        monkeypatch.setitem(CIFARS, "cifar100_lt", Cifar(original, 2, 4))
        return tmp_path

    def test_classes_and_images_come_in_the_files_order(self, data: Path) -> None:
        splits = load_splits("cifar100_lt", data, imbalance=2, validate_on="test")
        assert splits.class_names == ["apple", "bear"]
        assert splits.class_counts.tolist() == [4, 2]
        assert splits.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6]
        assert splits.train.labels.tolist() == [1, 0, 1, 0, 0, 0]
        assert splits.test.labels.tolist() == [1, 0]

    def test_a_damaged_file_is_named(self, data: Path) -> None:
        (data / "cifar-100-python" / "train").write_bytes(b"half a download")
        with pytest.raises(ValueError, match="cifar-100-python is incomplete or damaged"):
            load_splits("cifar100_lt", data)


@pytest.mark.parametrize("data", [None, "empty"])
@pytest.mark.parametrize(("name", "classes"), [("cifar10_lt", 10), ("cifar100_lt", 100)])
def test_missing_cifar_says_how_to_get_it(tmp_path: Path, name: str, classes: int, data: str | None) -> None:
    with pytest.raises(FileNotFoundError, match=rf"CIFAR{classes}\(DIR, download=True\)") as error:
        load_splits(name, data and tmp_path)
    assert "train/CLASS/RANK.png" in str(error.value)
    assert ("no data folder was given" if data is None else str(tmp_path)) in str(error.value)


class TestLists:
    def test_the_data_sets_own_validation_is_used(self, imagenet: Lists) -> None:
        splits = load("imagenet_lt", imagenet(train="a/cat/1.jpg 0\na/dog/1.jpg 1\na/dog/2.jpg 1\n"))
        assert splits.class_counts.tolist() == [1, 2]
        assert splits.class_names == ["cat", "dog"]
        assert [Path(path).parts[-3] for path in splits.validation.images] == ["val", "val"]
        assert splits.selected_on == "validation (the data set's own)"

    def test_validating_on_test(self, imagenet: Lists) -> None:
        splits = load("imagenet_lt", imagenet(), validate_on="test")
        assert splits.validation is splits.test
        assert splits.selected_on == "test (as the literature does)"

    def test_inaturalists_validation_is_the_test_set(self, tmp_path: Path) -> None:
        train = "".join(f"images/{k}/{i}.jpg {k}\n" for k in range(2) for i in range(20))
        (tmp_path / "iNaturalist18_train.txt").write_text(train)
        (tmp_path / "iNaturalist18_val.txt").write_text("images/0/99.jpg 0\n")
        splits = load("inaturalist18", tmp_path)
        assert splits.class_counts.tolist() == [18, 18]
        assert splits.validation.origins is not None
        assert all(origin.startswith("iNaturalist18_train.txt") for origin in splits.validation.origins)
        assert splits.test.images == [str(tmp_path / "images/0/99.jpg")]

    def test_paths_may_hold_spaces_and_any_letter(self, imagenet: Lists) -> None:
        folder = imagenet(train="größe 3/crème brûlée/ein bild.png 0\nx/猫/1.png 1\n")
        save_image(folder / "größe 3" / "crème brûlée" / "ein bild.png", (1, 2, 3))
        splits = load("imagenet_lt", folder)
        assert splits.class_names == ["crème brûlée", "猫"]
        assert open_image(splits.train, 0).getpixel((0, 0)) == (1, 2, 3)

    @pytest.mark.parametrize("line", ["cat/1.jpg", "cat/1.jpg x", "cat/1.jpg -1", "cat/1.jpg 1.0", "7"])
    def test_a_bad_line_is_named(self, imagenet: Lists, line: str) -> None:
        with pytest.raises(ValueError, match=rf"ImageNet_LT_train\.txt, line 3: expected `path label`.*{line}"):
            load("imagenet_lt", imagenet(train=f"cat/1.jpg 0\n\n{line}\n"))

    def test_an_empty_list_is_named(self, imagenet: Lists) -> None:
        with pytest.raises(ValueError, match=r"ImageNet_LT_train\.txt lists no image"):
            load("imagenet_lt", imagenet(train="\n"))

    def test_a_class_without_a_training_image_is_named(self, imagenet: Lists) -> None:
        with pytest.raises(ValueError, match=r"ImageNet_LT_train\.txt.*no image of 2 classes below: 1, 2\."):
            load("imagenet_lt", imagenet(train="cat/1.jpg 0\ndog/1.jpg 3\n"))

    @pytest.mark.parametrize("part", ["val", "test"])
    def test_a_label_that_training_lacks_is_named(self, imagenet: Lists, part: str) -> None:
        with pytest.raises(ValueError, match=rf"ImageNet_LT_{part}\.txt, line 2: label 2"):
            load("imagenet_lt", imagenet(**{part: "a/1.jpg 0\na/2.jpg 2\n"}))

    def test_other_sizes_than_the_published_give_one_warning(self, imagenet: Lists) -> None:
        folder = imagenet()
        with pytest.warns(UserWarning, match="not the published ImageNet-LT") as caught:
            load_splits("imagenet_lt", folder)
        assert len(caught) == 1
        assert "train 2 (published: 115,846)" in str(caught[0].message)
        assert "classes 2 (published: 1,000)" in str(caught[0].message)

    def test_the_published_sizes_give_none(self, tmp_path: Path) -> None:
        for part, count in (("train", 62_500), ("val", 7_300), ("test", 36_500)):
            lines = (f"{part}/{i % 365}/{i}.jpg {i % 365}\n" for i in range(count))
            (tmp_path / f"Places_LT_{part}.txt").write_text("".join(lines))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            splits = load_splits("places_lt", tmp_path)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (62_500, 7_300, 36_500)
        assert splits.num_classes == 365

    def test_all_missing_lists_are_named_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "Places_LT_val.txt").write_text("a/1.jpg 0\n")
        with pytest.raises(FileNotFoundError) as error:
            load_splits("places_lt", tmp_path)
        assert "Places_LT_train.txt" in str(error.value)
        assert "Places_LT_test.txt" in str(error.value)
        assert "Places_LT_val.txt" not in str(error.value)
        assert str(tmp_path) in str(error.value)
        assert "Long-Tailed Recognition in an Open World" in str(error.value)

    def test_no_folder_names_every_list(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"(?s)no data folder.*18_train\.txt.*18_val\.txt.*competition"):
            load_splits("inaturalist18", None)

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (("a/park/1.jpg", "b/lake/1.jpg"), ["park", "lake"]),
            (("arena/indoor/1.jpg", "pub/indoor/1.jpg"), ["arena/indoor", "pub/indoor"]),
            (("all/1.jpg", "all/2.jpg"), ["0", "1"]),
            (("1.jpg", "2.jpg"), ["0", "1"]),
        ],
    )
    def test_class_names(self, imagenet: Lists, paths: tuple[str, str], names: list[str]) -> None:
        train = "".join(f"{path} {label}\n" for label, path in enumerate(paths))
        assert load("imagenet_lt", imagenet(train=train)).class_names == names


@pytest.mark.parametrize(
    ("asked", "there", "hint"),
    [
        ("folder", ["cifar100_lt.npz"], "cifar100_lt"),
        ("folder", ["cifar-10-batches-py/"], "cifar10_lt"),
        ("folder", ["ImageNet_LT_train.txt", "train/n01440764/"], "imagenet_lt"),
        ("cifar10_lt", ["cifar100_lt.npz"], "cifar100_lt"),
        ("places_lt", ["train/ash/", "test/ash/"], "folder"),
    ],
)
def test_the_layout_of_another_data_set_is_named(tmp_path: Path, asked: str, there: list[str], hint: str) -> None:
    for path in there:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).mkdir(parents=True) if path.endswith("/") else (tmp_path / path).touch()
    with pytest.raises(NotFound, match=rf"\n{tmp_path} is laid out as {hint} is: --dataset {hint}$"):
        load_splits(asked, tmp_path)


class TestOpenImage:
    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, imagenet: Lists, mode: str) -> None:
        file = "1.tif" if mode == "CMYK" else "1.png"
        Image.new("RGB", (5, 7), (204, 204, 204)).convert(mode).save(tmp_path / file)
        image = open_image(load("imagenet_lt", imagenet(train=f"{file} 0\nb.png 1\n")).train, 0)
        assert (image.mode, image.size) == ("RGB", (5, 7))
        assert image.getpixel((2, 2)) == pytest.approx((204, 204, 204), abs=2)

    def test_a_missing_image_is_named_with_its_line(self, imagenet: Lists) -> None:
        folder = imagenet(train="cat/1.jpg 0\ncat/gone.jpg 0\ndog/1.jpg 1\n")
        expected = f"{folder / 'cat/gone.jpg'} (ImageNet_LT_train.txt, line 2): there is no such file"
        with pytest.raises(BadImage) as error:
            open_image(load("imagenet_lt", folder).train, 1)
        assert expected in str(error.value)

    @pytest.mark.parametrize(("keep", "cause"), [(0.5, "truncated"), (0.0, "the file is empty")])
    def test_a_truncated_jpeg_is_named_with_its_line(self, imagenet: Lists, keep: float, cause: str) -> None:
        folder = imagenet()
        path = folder / "train/dog/1.jpg"
        path.parent.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(BadImage, match=rf"train/dog/1\.jpg \(ImageNet_LT_train\.txt, line 2\): .*{cause}"):
            open_image(load("imagenet_lt", folder).train, 1)

    def test_held_out_images_keep_their_lines(self, tmp_path: Path) -> None:
        (tmp_path / "iNaturalist18_train.txt").write_text("".join(f"a/{i}.jpg {i // 9}\n" for i in range(10)))
        (tmp_path / "iNaturalist18_val.txt").write_text("a/9.jpg 0\n")
        held = load("inaturalist18", tmp_path).validation
        line = int(Path(held.images[0]).stem) + 1
        with pytest.raises(BadImage, match=rf"a/{line - 1}\.jpg \(iNaturalist18_train\.txt, line {line}\)"):
            open_image(held, 0)


def test_16_bit_gray_keeps_its_shades(tmp_path: Path) -> None:
    """Pillow alone would clip it to white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    opened = open_image(Samples([str(tmp_path / "ramp.png")], np.zeros(1, np.int64)), 0)
    assert np.array_equal(np.asarray(opened), np.rint(ramp / 257).astype(np.uint8)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_an_agreed_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(BadImage, match="no agreed range: convert them to 8 bits"):
        open_image(Samples([str(tmp_path / "image.tiff")], np.zeros(1, np.int64)), 0)
