"""ImageNet-LT, Places-LT and iNaturalist 2018: text files of `path label` lines beside the images."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from rcl_fast.train.data.samples import RawDataset, Samples, missing_data
from rcl_fast.train.errors import UserError

_OLTR = 'by the authors of "Large-Scale Long-Tailed Recognition in an Open World" (CVPR 2019)'


@dataclass(frozen=True)
class Listed:
    """A data set given as lists: its files, and its published sizes."""

    title: str
    files: dict[str, str]
    """{"train": file, "test": file} and, where the data set has one, {"validation": file}."""
    sizes: dict[str, int]
    num_classes: int
    source: str


LISTS = {
    "imagenet_lt": Listed(
        "ImageNet-LT",
        {
            "train": "ImageNet_LT_train.txt",
            "validation": "ImageNet_LT_val.txt",
            "test": "ImageNet_LT_test.txt",
        },
        {"train": 115_846, "validation": 20_000, "test": 50_000},
        1_000,
        f"The lists were published {_OLTR}; the images are ImageNet's ILSVRC2012 (image-net.org).",
    ),
    "places_lt": Listed(
        "Places-LT",
        {"train": "Places_LT_train.txt", "validation": "Places_LT_val.txt", "test": "Places_LT_test.txt"},
        {"train": 62_500, "validation": 7_300, "test": 36_500},
        365,
        f"The lists were published {_OLTR}; the images are Places365-Standard's (places2.csail.mit.edu).",
    ),
    "inaturalist18": Listed(
        "iNaturalist 2018",
        {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"},
        {"train": 437_513, "test": 24_426},
        8_142,
        "The images and annotations are on the page of the iNaturalist 2018 competition "
        "(github.com/visipedia/inat_comp, folder 2018); the lists come with the code of several long-tail papers. "
        "Its validation set is the test set here, as in the literature.",
    ),
}


def load_lists(name: str, data: Path | None) -> RawDataset:
    """Returns data set `name` from its lists in the folder `data`; opens no image.

    Raises FileNotFoundError naming every missing list, ValueError naming file and line of a bad entry, or a class
    that has no training image. Warns where the sizes are not the published ones.
    """
    known = LISTS[name]
    absent = [file for file in known.files.values() if data is None or not (data / file).is_file()]
    if data is None or absent:
        how = f"The images go below the same folder, at the paths in the lists. {known.source}"
        raise missing_data(name, data, absent, how)
    parts = {part: _read_list(data / file) for part, file in known.files.items()}
    train = parts["train"]
    num_classes = int(train.labels.max()) + 1
    _check_every_class(train.labels, num_classes, data / known.files["train"])
    for part in parts.values():
        _check_labels(part, num_classes)
    _warn_of_sizes(known, parts, num_classes)
    return RawDataset(
        train=train,
        test=parts["test"],
        class_names=_class_names(train),
        validation=parts.get("validation"),
    )


def _read_list(file: Path) -> Samples:
    paths, labels, origins = [], [], []
    folder = str(file.parent)
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")  # the path may hold spaces
            if not path.strip() or not label.isdecimal():
                raise UserError(f"{file}, line {number}: expected `path label`, found {line.strip()!r}")
            paths.append(os.path.join(folder, path.strip()))
            labels.append(int(label))
            origins.append(f"{file.name}, line {number}")
    if not paths:
        raise UserError(f"{file} lists no image: expected lines of `path label`")
    return Samples(paths, np.array(labels, np.int64), origins)


def _check_every_class(labels: NDArray[np.int64], num_classes: int, file: Path) -> None:
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(empty):
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise UserError(
            f"{file}: its largest label is {num_classes - 1}, but it has no image of {len(empty)} classes below: "
            f"{some}. Labels count from 0 without gaps"
        )


def _check_labels(part: Samples, num_classes: int) -> None:
    outside = np.flatnonzero(part.labels >= num_classes)
    if len(outside) and part.origins:
        raise UserError(
            f"{part.origins[outside[0]]}: label {part.labels[outside[0]]} is not among the training set's, "
            f"0 to {num_classes - 1}"
        )


def _warn_of_sizes(known: Listed, parts: dict[str, Samples], num_classes: int) -> None:
    sizes = {part: len(samples) for part, samples in parts.items()} | {"classes": num_classes}
    published = known.sizes | {"classes": known.num_classes}
    differing = [f"{what} {n:,} (published: {published[what]:,})" for what, n in sizes.items() if n != published[what]]
    if differing:
        warnings.warn(f"these lists are not the published {known.title}: {'; '.join(differing)}", stacklevel=5)


def _class_names(train: Samples) -> list[str]:
    """Returns a name for each class.

    It is the folder of the class's first image, or that with its parent folder where folders alone are not unique, or
    else the label.
    """
    labels, first = np.unique(train.labels, return_index=True)
    folders = [PurePath(train.images[i]).parts[:-1] for i in first]
    for depth in (1, 2):
        names = ["/".join(folder[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(label) for label in labels]
