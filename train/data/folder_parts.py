"""DATA/train, DATA/val and DATA/test of an image folder, as they lie on the disk."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rcl_fast.train.data.image_files import ImageFiles, find_image_files, is_hidden, is_image
from rcl_fast.train.data.samples import Samples
from rcl_fast.train.runtime.files import escaped


class Part(NamedTuple):
    """What is in DATA/train, DATA/val or DATA/test."""

    folder: Path
    classes: dict[str, ImageFiles]  # by name
    problems: list[str]
    loose: list[str]  # images beside the folders of the classes
    hidden: list[str]

    def holding(self, name: str) -> bool:
        return name in self.classes and len(self.classes[name].images) > 0


def find_part(folder: Path) -> Part:
    """Returns what is in a part of DATA. Nothing on the disk makes this raise."""
    part = Part(folder, {}, [], [], [])
    folders: dict[str, str] = {}
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        part.problems.append(f"{folder} can't be listed ({error.strerror})")
        inside = []
    for path in inside:
        if is_hidden(path.name):
            part.hidden.extend([str(path)] if path.is_dir() else [])
        elif path.is_symlink() and not path.exists():
            part.problems.append(f"{path} is a link to nothing")
        elif not path.is_dir():
            part.loose.extend([str(path)] if is_image(path.name) else [])
        else:
            name = escaped(unicodedata.normalize("NFC", path.name))
            if name in folders:
                part.problems.append(f"{folder} has two folders for class {name}, {folders[name]!a} and {path.name!a}")
                continue
            folders[name] = path.name
            part.classes[name] = find_image_files(path)
            part.problems.extend(part.classes[name].unreadable)
    return part


def samples_of(part: Part, names: Sequence[str]) -> Samples:
    """Returns the images of a part, class by class in the order of the names."""
    images = [part.classes[name].images if name in part.classes else {} for name in names]
    labels = np.repeat(np.arange(len(names)), [len(of_class) for of_class in images])
    return Samples([path for of_class in images for path in of_class], labels.astype(np.int64))
