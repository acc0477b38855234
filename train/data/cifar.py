"""CIFAR-10 and CIFAR-100 made long-tailed, from arrays, torchvision's files or an image folder, into memory."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10, CIFAR100

from rcl_fast.train.data.folder import image_folder
from rcl_fast.train.data.long_tail import ImbalanceShape, first_of_each_class, long_tailed_counts
from rcl_fast.train.data.samples import BadImage, RawDataset, Samples, missing_data, open_image, subset
from rcl_fast.train.errors import UserError
from rcl_fast.train.runtime.wording import first_lines


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets."""

    torchvision: type[CIFAR10]
    num_classes: int
    n_max: int
    """Training images of each class of the balanced original."""


CIFARS = {
    "cifar10_lt": Cifar(CIFAR10, num_classes=10, n_max=5_000),
    "cifar100_lt": Cifar(CIFAR100, num_classes=100, n_max=500),
}


def cifar_lt(name: str, data: Path | None, imbalance: float, shape: ImbalanceShape) -> RawDataset:
    """Returns the long-tailed training set (the first images of each class) and the whole test set, as uint8 arrays.

    Classes come in the order of the file's indices, or alphabetically from a folder (its file names are ranks).
    Raises FileNotFoundError without data, ValueError where it is not as it should be or a class has too few images for
    this imbalance.
    """
    cifar = CIFARS[name]
    balanced = _read(name, cifar, data)
    counts = long_tailed_counts(cifar.n_max, cifar.num_classes, imbalance, shape)
    _check_enough(balanced, counts, f"{name} in {data}, {shape} imbalance {imbalance:g}")
    return RawDataset(
        train=_in_memory(subset(balanced.train, first_of_each_class(balanced.train.labels, counts))),
        test=_in_memory(balanced.test),
        class_names=balanced.class_names,
    )


def _read(name: str, cifar: Cifar, data: Path | None) -> RawDataset:
    base, arrays = cifar.torchvision.base_folder, f"{name}.npz"
    if data is not None and (data / arrays).is_file():
        return _from_arrays(name, cifar.num_classes, data / arrays)
    if data is not None and (data / base).is_dir():
        return _from_torchvision(cifar, data)
    if data is not None and (data / "train").is_dir():
        raw = image_folder(data)
        if len(raw.class_names) != cifar.num_classes:
            raise UserError(
                f"{name} has {cifar.num_classes} classes, and {data / 'train'} has {len(raw.class_names)}: "
                "--dataset folder trains on any number"
            )
        return raw
    raise missing_data(
        name,
        data,
        [
            f"{arrays} (arrays {', '.join(_ARRAYS)})",
            f"or {base}/ (torchvision's files)",
            "or train/CLASS/RANK.png and test/CLASS/RANK.png",
        ],
        f"To download them: torchvision.datasets.{cifar.torchvision.__name__}(DIR, download=True)",
    )


class _Form(NamedTuple):
    """What is expected of an array: in words, and as a test of it."""

    words: str
    fits: Callable[[NDArray[Any]], bool]


_IMAGES = _Form(
    "uint8 [n, 32, 32, 3], n >= 1", lambda a: a.dtype == np.uint8 and a.shape[1:] == (32, 32, 3) and len(a) > 0
)
_LABELS = _Form("integers [n]", lambda a: a.dtype.kind in "iu" and a.ndim == 1)
_NAMES = _Form("unicode strings [C]", lambda a: a.dtype.kind == "U" and a.ndim == 1)
_ARRAYS = {"train": _IMAGES, "train_labels": _LABELS, "test": _IMAGES, "test_labels": _LABELS, "class_names": _NAMES}


def _from_arrays(name: str, num_classes: int, file: Path) -> RawDataset:
    """Returns the data set in an npz file; raises ValueError with everything that is wrong with the file."""
    with file.open("rb") as opened:
        if not zipfile.is_zipfile(opened):
            raise UserError(f"{file} is no npz file, or a part of one: copy it again")
        opened.seek(0)
        arrays, wrong = _read_arrays(opened)
    fitting = {key: array for key, array in arrays.items() if _ARRAYS[key].fits(array)}
    wrong += [
        f"{key} is {array.dtype} {list(array.shape)}, and {_ARRAYS[key].words} is expected"
        for key, array in arrays.items()
        if key not in fitting
    ]
    wrong += _contradictions(name, num_classes, fitting)
    if wrong:
        raise UserError("\n  ".join([f"{file} does not hold {name}:", *wrong]))
    train, test = (
        Samples(np.ascontiguousarray(arrays[part]), arrays[f"{part}_labels"].astype(np.int64))
        for part in ("train", "test")
    )
    return RawDataset(train, test, class_names=arrays["class_names"].tolist())


def _read_arrays(file: BinaryIO) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Returns the arrays of _ARRAYS that can be read, and a sentence for each that can't."""
    arrays, wrong = {}, []
    try:
        with np.load(file, allow_pickle=False) as stored:
            missing = [key for key in _ARRAYS if key not in stored.files]
            if missing:
                wrong.append(f"missing: {', '.join(missing)}; it has: {', '.join(stored.files) or 'nothing'}")
            for key in (key for key in _ARRAYS if key in stored.files):
                try:
                    arrays[key] = np.asarray(stored[key])
                except Exception as error:  # damaged bytes make zipfile and NumPy raise almost anything
                    wrong.append(f"{key} can't be read: {type(error).__name__}: {error}")
    except Exception as error:  # damaged bytes, too
        wrong.append(f"it can't be read: {type(error).__name__}: {error}")
    return arrays, wrong


def _contradictions(name: str, num_classes: int, arrays: dict[str, NDArray[Any]]) -> Iterator[str]:
    """Gives a sentence for each contradiction between arrays that each have their form."""
    for part in ("train", "test"):
        images, labels = arrays.get(part), arrays.get(f"{part}_labels")
        if labels is None:
            continue
        if images is not None and len(images) != len(labels):
            yield f"{part} has {len(images):,} images, and {part}_labels {len(labels):,} labels"
        outside = labels[(labels < 0) | (labels >= num_classes)]
        if len(outside):
            yield f"{part}_labels has {len(outside):,} labels outside 0 to {num_classes - 1}, such as {outside[0]}"
    names = arrays.get("class_names")
    if names is not None and len(names) != num_classes:
        yield f"class_names has {len(names)} names, and {name} has {num_classes} classes"


def _from_torchvision(cifar: Cifar, data: Path) -> RawDataset:
    try:
        train, test = cifar.torchvision(data, train=True), cifar.torchvision(data, train=False)
    except RuntimeError as error:
        raise UserError(
            f"{data / cifar.torchvision.base_folder} is incomplete or damaged: delete it, then "
            f"torchvision.datasets.{cifar.torchvision.__name__}({str(data)!r}, download=True)"
        ) from error
    parts = [Samples(part.data, np.array(part.targets, np.int64)) for part in (train, test)]
    return RawDataset(train=parts[0], test=parts[1], class_names=list(train.classes))


def _check_enough(balanced: RawDataset, counts: np.ndarray, what: str) -> None:
    available = np.bincount(balanced.train.labels, minlength=len(counts))
    short = np.flatnonzero(available < counts)
    if len(short):
        k = short[0]
        raise UserError(
            f"{what}: {len(short)} of {len(counts)} classes have too few training images; "
            f"{balanced.class_names[k]!r} has {available[k]} and {counts[k]} are needed. "
            "Choose a larger imbalance, or the complete data set"
        )


def _in_memory(samples: Samples) -> Samples:
    """Returns the samples with their images as one uint8 array [n, 32, 32, 3]. Raises BadImage with all bad ones."""
    if isinstance(samples.images, np.ndarray):
        return samples
    images, wrong = np.empty((len(samples), 32, 32, 3), np.uint8), []
    for index in range(len(samples)):
        try:
            image = open_image(samples, index)
        except BadImage as error:
            wrong.append(str(error))
            continue
        if image.size == (32, 32):
            images[index] = np.asarray(image)
        else:
            wrong.append(f"{samples.images[index]} is {image.width}x{image.height} pixels, and CIFAR's are 32x32")
    if wrong:
        raise BadImage("\n".join(first_lines(wrong)))
    return Samples(images, samples.labels)
