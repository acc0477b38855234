"""CIFAR from an npz file: the same as from a folder of PNGs, array for array, and what is wrong is said at once."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rcl_fast.train import verify
from rcl_fast.train.config import recipe
from rcl_fast.train.data.cifar import CIFARS, Cifar
from rcl_fast.train.data.datasets import Splits, load_splits
from rcl_fast.train.loaders.base import training_spec
from rcl_fast.train.loaders.build import make_loader
from rcl_fast.train.options import training_kinds

Arrays = dict[str, NDArray[Any]]
CLASSES = ["airplane", "bird", "cat"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 with 3 classes of 8 images."""
    monkeypatch.setitem(CIFARS, "cifar10_lt", Cifar(CIFARS["cifar10_lt"].torchvision, 3, 8))


@pytest.fixture
def arrays() -> Arrays:
    """8, 4 and 2 training images of noise (a set cut at an imbalance of 4) and 2 test images of each class."""
    random = np.random.default_rng(0)
    train_labels, test_labels = np.repeat(np.arange(3), (8, 4, 2)), np.repeat(np.arange(3), 2)
    return {
        "train": random.integers(0, 256, (len(train_labels), 32, 32, 3), np.uint8),
        "train_labels": train_labels,
        "test": random.integers(0, 256, (len(test_labels), 32, 32, 3), np.uint8),
        "test_labels": test_labels,
        "class_names": np.array(CLASSES),
    }


def saved(arrays: Arrays, folder: Path) -> Path:
    """The folder, with the arrays in its npz file."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "cifar10_lt.npz", **arrays)
    return folder


def as_folder(arrays: Arrays, folder: Path) -> Path:
    """The folder, with each image as a PNG."""
    for part in ("train", "test"):
        labels = arrays[f"{part}_labels"]
        for index, (image, label) in enumerate(zip(arrays[part], labels, strict=True)):
            file = folder / part / CLASSES[label] / f"{index - np.flatnonzero(labels == label)[0]:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return folder


def load(data: Path, **options: Any) -> Splits:
    return load_splits("cifar10_lt", data, **{"imbalance": 4, **options})


def refusal(data: Path) -> str:
    """Why the data is refused."""
    with pytest.raises(ValueError, match=r"cifar10_lt\.npz") as error:
        load(data)
    return str(error.value)


class TestTheSameAsTheFolder:
    @pytest.mark.parametrize(
        ("options", "counts"),
        [
            ({}, [8, 4, 2]),
            ({"imbalance": 8}, [8, 2, 1]),
            ({"imbalance": 8, "validate_on": "test"}, [8, 2, 1]),
            ({"imbalance": 8, "imbalance_shape": "step", "validation_fraction": 0.3, "seed": 3}, [8, 1, 1]),
        ],
    )
    def test_array_for_array(self, arrays: Arrays, tmp_path: Path, options: dict[str, Any], counts: list[int]) -> None:
        ours = load(saved(arrays, tmp_path / "npz"), **options)
        folders = load(as_folder(arrays, tmp_path / "png"), **options)
        for part in ("train", "validation", "test"):
            mine, theirs = getattr(ours, part), getattr(folders, part)
            assert mine.images.dtype == theirs.images.dtype == np.uint8
            assert np.array_equal(mine.images, theirs.images)
            assert mine.labels.dtype == theirs.labels.dtype == np.int64
            assert np.array_equal(mine.labels, theirs.labels)
        assert ours.published_counts.tolist() == folders.published_counts.tolist() == counts
        assert (ours.class_names, ours.selected_on) == (folders.class_names, folders.selected_on)

    def test_a_set_cut_at_this_imbalance_is_used_whole(self, arrays: Arrays, tmp_path: Path) -> None:
        assert np.array_equal(load(saved(arrays, tmp_path), validate_on="test").train.images, arrays["train"])

    def test_a_set_cut_at_a_larger_imbalance_is_refused(self, arrays: Arrays, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"2 of 3 classes .* 'bird' has 4 and 5 are needed.*larger imbalance"):
            load(saved(arrays, tmp_path), imbalance=2)

    def test_a_saved_position_of_the_one_goes_on_in_the_other(self, arrays: Arrays, tmp_path: Path) -> None:
        """The loaders' fingerprints hold the pixels, not where they came from; their batches are the same."""
        views = recipe("cifar10_lt", "bcl_rcl").views
        specs = [
            training_spec(load(data).train, training_kinds(views, contrastive=True), views, seed=0, batch_size=4)
            for data in (saved(arrays, tmp_path / "npz"), as_folder(arrays, tmp_path / "png"))
        ]
        for name in ("device", "torchvision"):
            one, other = (make_loader(name, spec, device=torch.device("cpu"), workers=0) for spec in specs)
            assert one.fingerprint == other.fingerprint
            for mine, theirs in zip(one.epoch(1), other.epoch(1), strict=True):
                assert all(map(torch.equal, mine.views, theirs.views))
                assert torch.equal(mine.labels, theirs.labels)
                assert torch.equal(mine.indices, theirs.indices)

    def test_verify_counts_it(self, arrays: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert verify.main(["--dataset", "cifar10_lt", "--data", str(saved(arrays, tmp_path))]) == 0
        assert "3 classes; training images that decode: 7 (airplane) down to 1" in capsys.readouterr().out


def test_the_npz_comes_before_the_folders(arrays: Arrays, tmp_path: Path) -> None:
    as_folder({**arrays, "test": 255 - arrays["test"]}, saved(arrays, tmp_path))
    assert np.array_equal(load(tmp_path).test.images, arrays["test"])


def test_the_first_images_of_each_class_are_taken_in_the_files_order(arrays: Arrays, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(14)
    mixed = {**arrays, "train": arrays["train"][order], "train_labels": arrays["train_labels"][order]}
    train = load(saved(mixed, tmp_path), imbalance=8, validate_on="test").train
    wanted = np.sort(np.concatenate([np.flatnonzero(mixed["train_labels"] == k)[:n] for k, n in enumerate((8, 2, 1))]))
    assert np.array_equal(train.images, mixed["train"][wanted])
    assert np.array_equal(train.labels, mixed["train_labels"][wanted])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, ">i4"])
def test_labels_are_any_integers(arrays: Arrays, tmp_path: Path, dtype: Any) -> None:
    loaded = load(saved({**arrays, "train_labels": arrays["train_labels"].astype(dtype)}, tmp_path), validate_on="test")
    assert loaded.train.labels.dtype == np.int64
    assert np.array_equal(loaded.train.labels, arrays["train_labels"])


def test_the_order_of_the_bytes_does_not_matter(arrays: Arrays, tmp_path: Path) -> None:
    loaded = load(saved({**arrays, "test": np.asfortranarray(arrays["test"])}, tmp_path))
    assert np.array_equal(loaded.test.images, arrays["test"])
    assert loaded.test.images.flags.c_contiguous


class TestRefused:
    @pytest.mark.parametrize(
        ("changed", "expected"),
        [
            ({"train": np.zeros((14, 32, 32, 3), np.float32)}, "train is float32 [14, 32, 32, 3], and uint8 [n, 32"),
            ({"test": np.zeros((6, 3, 32, 32), np.uint8)}, "test is uint8 [6, 3, 32, 32], and uint8 [n, 32, 32, 3]"),
            ({"test": np.zeros((32, 32, 3), np.uint8)}, "test is uint8 [32, 32, 3], and uint8 [n, 32, 32, 3]"),
            ({"test": np.zeros((0, 32, 32, 3), np.uint8)}, "test is uint8 [0, 32, 32, 3], and uint8 [n, 32, 32, 3]"),
            ({"train_labels": np.zeros(14)}, "train_labels is float64 [14], and integers [n] is expected"),
            ({"train_labels": np.zeros((14, 1), int)}, "train_labels is int64 [14, 1], and integers [n] is expected"),
            ({"test_labels": np.full(6, True)}, "test_labels is bool [6], and integers [n] is expected"),
            ({"class_names": np.arange(3)}, "class_names is int64 [3], and unicode strings [C] is expected"),
            ({"class_names": np.array(CLASSES, object)}, "class_names can't be read: ValueError: Object arrays"),
            ({"class_names": np.array(["a", "b"])}, "class_names has 2 names, and cifar10_lt has 3 classes"),
            ({"test_labels": np.array([0, 0, 1, 1, 2, 3])}, "test_labels has 1 labels outside 0 to 2, such as 3"),
            ({"test_labels": np.array([0, 0, -2, -1, 2, 2])}, "test_labels has 2 labels outside 0 to 2, such as -2"),
            ({"test_labels": np.zeros(5, int)}, "test has 6 images, and test_labels 5 labels"),
        ],
    )
    def test_what_is_wrong_is_named(self, arrays: Arrays, tmp_path: Path, changed: Arrays, expected: str) -> None:
        message = refusal(saved({**arrays, **changed}, tmp_path))
        assert expected in message
        assert len(message.splitlines()) == 2, "nothing else is wrong"
        assert str(tmp_path / "cifar10_lt.npz") in message

    def test_missing_arrays_are_named_with_those_that_are_there(self, arrays: Arrays, tmp_path: Path) -> None:
        there = {"images": arrays["train"], "train_labels": arrays["train_labels"], "class_names": np.array(CLASSES)}
        assert "missing: train, test, test_labels; it has: images, train_labels, class_names" in refusal(
            saved(there, tmp_path)
        )

    def test_all_that_is_wrong_is_said_at_once(self, arrays: Arrays, tmp_path: Path) -> None:
        wrong = {
            "train": arrays["train"][:, :16],
            "train_labels": np.full(14, 7),
            "test": arrays["test"][:5],
            "class_names": np.array(["airplane"]),
            "test_labels": np.array([0, 0, 1, 1, 2, 2], np.uint8),
        }
        message = refusal(saved(wrong, tmp_path))
        for part in ("train is uint8 [14, 16, 32, 3]", "14 labels outside 0 to 2", "5 images, and", "has 1 names"):
            assert part in message
        assert "is expected" in message
        assert len(message.splitlines()) == 5

    @pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 and no more"])
    def test_another_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "cifar10_lt.npz").write_bytes(content)
        assert "is no npz file, or a part of one" in refusal(tmp_path)

    def test_a_part_of_the_file_is_refused(self, arrays: Arrays, tmp_path: Path) -> None:
        file = saved(arrays, tmp_path) / "cifar10_lt.npz"
        file.write_bytes(file.read_bytes()[:-1000])
        assert "is no npz file, or a part of one" in refusal(tmp_path)

    def test_a_flipped_bit_is_found_and_the_array_named(self, arrays: Arrays, tmp_path: Path) -> None:
        file = saved(arrays, tmp_path) / "cifar10_lt.npz"
        content = bytearray(file.read_bytes())
        content[content.index(arrays["test"].tobytes()) + 5000] ^= 1
        file.write_bytes(content)
        message = refusal(tmp_path)
        assert "test can't be read: BadZipFile" in message
        assert len(message.splitlines()) == 2, "the others are fine"

    def test_a_member_that_is_no_array_is_named(self, arrays: Arrays, tmp_path: Path) -> None:
        del arrays["class_names"]
        with zipfile.ZipFile(saved(arrays, tmp_path) / "cifar10_lt.npz", "a") as archive:
            archive.writestr("class_names", "\n".join(CLASSES))
        assert "class_names is |S" in refusal(tmp_path)

    def test_a_folder_of_that_name_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "cifar10_lt.npz").mkdir()
        with pytest.raises(OSError, match=r"cifar10_lt\.npz"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["cifar10_lt", "cifar100_lt"])
def test_missing_data_names_the_npz_and_its_arrays(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"{name}\.npz \(arrays train, train_labels, test, test_labels, class_"
    ):
        load_splits(name, tmp_path)
