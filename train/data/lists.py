"""ImageNet-LT, Places-LT and iNaturalist 2018: text files of `path label` lines beside the images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from rcl_fast.train.data.list_file import read_list
from rcl_fast.train.data.samples import RawDataset, Samples, missing_data
from rcl_fast.train.errors import UserError
from rcl_fast.train.runtime.files import escaped
from rcl_fast.train.runtime.wording import SHOWN, counted, some

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

    A list is UTF-8; a path in it that is not must be that of a file. Warns where the sizes are not the published ones,
    and where an image is listed more than once.

    Raises:
        NotFound: every list that is missing.
        UserError: everything that is wrong with the lists, by file and line.
    """
    known = LISTS[name]
    absent = [file for file in known.files.values() if data is None or not (data / file).is_file()]
    if data is None or absent:
        how = f"The images go below the same folder, at the paths in the lists. {known.source}"
        raise missing_data(name, data, absent, how)
    lists = {part: read_list(data / file) for part, file in known.files.items()}
    problems = [problem for part in lists.values() for problem in part.problems]
    train = lists["train"].samples
    num_classes = int(train.labels.max(initial=-1)) + 1
    if not lists["train"].problems:  # which would bring others with them
        problems += _empty_classes(train, num_classes, data / known.files["train"])
        for part, file in known.files.items():
            problems += _unknown_labels(lists[part].samples, num_classes, data / file)
    if problems:
        raise UserError("\n  ".join([f"{name}: these lists can't be trained on as they are:", *problems]))
    parts = {part: of.samples for part, of in lists.items()}
    _warn_of_sizes(known, parts, num_classes)
    _warn_of_repetitions(parts)
    return RawDataset(
        train=train,
        test=parts["test"],
        class_names=_class_names(train),
        validation=parts.get("validation"),
    )


def _empty_classes(part: Samples, num_classes: int, file: Path) -> Iterator[str]:
    empty = np.flatnonzero(np.bincount(part.labels, minlength=num_classes) == 0)
    if len(empty):
        yield (
            f"{_line(part, int(part.labels.argmax()), file)} has the largest label, {num_classes - 1}, but there is no "
            f"image of {len(empty):,} classes below: {some(empty)}. "
            "Labels count from 0 without gaps"
        )


def _unknown_labels(part: Samples, num_classes: int, file: Path) -> Iterator[str]:
    outside = np.flatnonzero(part.labels >= num_classes)
    if len(outside):
        more = f", nor are those of {counted(outside[1:], 'more line')}" if len(outside) > 1 else ""
        yield (
            f"{_line(part, int(outside[0]), file)}: label {part.labels[outside[0]]} is not among the training set's, "
            f"0 to {num_classes - 1}{more}"
        )


def _line(part: Samples, index: int, file: Path) -> str:
    assert part.origins is not None  # lists have them
    return str(file.parent / part.origins[index])


def _warn_of_sizes(known: Listed, parts: dict[str, Samples], num_classes: int) -> None:
    sizes = {part: len(samples) for part, samples in parts.items()} | {"classes": num_classes}
    published = known.sizes | {"classes": known.num_classes}
    differing = [f"{what} {n:,} (published: {published[what]:,})" for what, n in sizes.items() if n != published[what]]
    if differing:
        warnings.warn(f"these lists are not the published {known.title}: {'; '.join(differing)}", stacklevel=5)


def _warn_of_repetitions(parts: dict[str, Samples]) -> None:
    """Warns of images that one list has more than once, and of those that two lists have."""
    seen: dict[str, dict[str, int]] = {}
    for part, samples in parts.items():
        assert samples.origins is not None  # lists have them
        first: dict[str, int] = {}
        paths = [os.path.normpath(path) if _may_be_written_otherwise(path) else path for path in samples.images]
        again = [i for i, path in enumerate(paths) if first.setdefault(path, i) != i]
        if again:
            labels = samples.labels
            two = [i for i in again if labels[i] != labels[first[paths[i]]]]
            what = f", {len(two):,} with another label" if two else ""
            shown = [f"{samples.images[i]} ({samples.origins[i]})" for i in (two or again)[:SHOWN]]
            warnings.warn(f"listed more than once: {counted(again, 'image')}{what}: {', '.join(shown)}", stacklevel=6)
        for other, of_other in seen.items():
            both = [path for path in first if path in of_other]
            if both:
                warnings.warn(f"listed in {other} and in {part}: {counted(both, 'image')}: {some(both)}", stacklevel=6)
        seen[part] = first


def _may_be_written_otherwise(path: str) -> bool:
    return "/./" in path or "/../" in path or "//" in path


def _class_names(train: Samples) -> list[str]:
    """Returns a name for each class.

    It is the folder of the class's first image, or that with its parent folder where folders alone are not unique, or
    else the label.
    """
    labels, first = np.unique(train.labels, return_index=True)
    folders = [PurePath(train.images[i]).parts[:-1] for i in first]
    for depth in (1, 2):
        names = [escaped("/".join(folder[-depth:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(label) for label in labels]
