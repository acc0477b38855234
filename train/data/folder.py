"""Image folders: DIR/train/CLASS/*, DIR/test/CLASS/*."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from rcl_fast.train.data.samples import RawDataset, Samples, missing_data
from rcl_fast.train.errors import UserError


def image_folder(data: Path | None) -> RawDataset:
    """Returns an image folder as it is: classes in alphabetical order, the images of a class by file name.

    Raises FileNotFoundError where a folder is missing or a class has no training image, ValueError for a class
    that only the test set has. Warns where the test set lacks a class.
    """
    absent = [part for part in ("train", "test") if data is None or not (data / part).is_dir()]
    if data is None or absent:
        expected = [f"{part}/CLASS/IMAGE" for part in absent]
        raise missing_data("folder", data, expected, f"Image formats: {' '.join(IMG_EXTENSIONS)}")
    class_names, class_to_index = find_classes(data / "train")
    return RawDataset(
        train=_samples(data / "train", class_to_index),
        test=_samples(data / "test", _tested(data, class_to_index)),
        class_names=class_names,
    )


def _tested(data: Path, class_to_index: dict[str, int]) -> dict[str, int]:
    """Returns the indices of the classes that the test set has, by name. Raises and warns as `image_folder`."""
    names, _ = find_classes(data / "test")
    unknown = sorted(set(names) - set(class_to_index))
    if unknown:
        raise UserError(f"{data / 'test'} has classes that {data / 'train'} lacks: {', '.join(unknown)}")
    untested = sorted(set(class_to_index) - set(names))
    if untested:
        warnings.warn(f"{data / 'test'} has no images of: {', '.join(untested)}", stacklevel=5)
    return {name: class_to_index[name] for name in names}


def _samples(folder: Path, class_to_index: dict[str, int]) -> Samples:
    images = make_dataset(str(folder), class_to_index, extensions=IMG_EXTENSIONS)
    return Samples([path for path, _ in images], np.array([label for _, label in images], np.int64))
