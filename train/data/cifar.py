"""CIFAR-10 and CIFAR-100 made long-tailed, from torchvision's files or from an image folder, into memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.io import ImageReadMode, decode_image

from rcl_fast.train.data.folder import image_folder
from rcl_fast.train.data.long_tail import ImbalanceShape, first_of_each_class, long_tailed_counts
from rcl_fast.train.data.missing import missing_data
from rcl_fast.train.data.samples import BadImage, Published, Samples, open_image, take


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


def cifar_lt(name: str, data: Path | None, imbalance: float, shape: ImbalanceShape) -> Published:
    """Long-tailed training set (the first images of each class) and the whole test set, as uint8 arrays.

    Classes come in the order of the file's indices, or alphabetically from a folder (its file names are ranks).
    Raises FileNotFoundError without data, ValueError where a class has too few images for this imbalance.
    """
    cifar = CIFARS[name]
    balanced = _read(name, cifar, data)
    counts = long_tailed_counts(cifar.n_max, cifar.num_classes, imbalance, shape)
    _check_enough(balanced, counts, f"{name} in {data}, {shape} imbalance {imbalance:g}")
    return Published(
        train=_in_memory(take(balanced.train, first_of_each_class(balanced.train.labels, counts))),
        test=_in_memory(balanced.test),
        class_names=balanced.class_names,
    )


def _read(name: str, cifar: Cifar, data: Path | None) -> Published:
    base = cifar.torchvision.base_folder
    if data is not None and (data / base).is_dir():
        return _from_torchvision(cifar, data)
    if data is not None and (data / "train").is_dir():
        published = image_folder(data)
        if len(published.class_names) != cifar.num_classes:
            raise ValueError(
                f"{name} has {cifar.num_classes} classes, and {data / 'train'} has {len(published.class_names)}"
            )
        return published
    raise missing_data(
        name,
        data,
        [f"{base}/ (torchvision's files)", "or train/CLASS/RANK.png and test/CLASS/RANK.png"],
        f"To download them: torchvision.datasets.{cifar.torchvision.__name__}(DIR, download=True)",
    )


def _from_torchvision(cifar: Cifar, data: Path) -> Published:
    try:
        train, test = cifar.torchvision(data, train=True), cifar.torchvision(data, train=False)
    except RuntimeError as error:
        raise ValueError(
            f"{data / cifar.torchvision.base_folder} is incomplete or damaged: delete it, then "
            f"torchvision.datasets.{cifar.torchvision.__name__}({str(data)!r}, download=True)"
        ) from error
    parts = [Samples(part.data, np.array(part.targets, np.int64)) for part in (train, test)]
    return Published(train=parts[0], test=parts[1], class_names=list(train.classes))


def _check_enough(balanced: Published, counts: np.ndarray, what: str) -> None:
    available = np.bincount(balanced.train.labels, minlength=len(counts))
    short = np.flatnonzero(available < counts)
    if len(short):
        k = short[0]
        raise ValueError(
            f"{what}: {len(short)} of {len(counts)} classes have too few training images; "
            f"{balanced.class_names[k]!r} has {available[k]} and {counts[k]} are needed. "
            "Choose a larger imbalance, or the complete data set"
        )


def _in_memory(samples: Samples) -> Samples:
    """The samples as one uint8 array [n, 32, 32, 3]."""
    if isinstance(samples.images, np.ndarray):
        return samples
    images = np.empty((len(samples), 32, 32, 3), np.uint8)
    for index, path in enumerate(samples.images):
        image = _decode(samples, index)
        if image.shape != (32, 32, 3):
            height, width, _ = image.shape
            raise BadImage(f"{path} is {width}x{height} pixels, and CIFAR's images are 32x32")
        images[index] = image
    return Samples(images, samples.labels)


def _decode(samples: Samples, index: int) -> np.ndarray:
    """Image `index`, uint8 [H, W, 3]: by torchvision, twice as fast as Pillow here, which then names what is bad."""
    try:
        return decode_image(samples.images[index], ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except RuntimeError:
        return np.asarray(open_image(samples, index))
