"""Image folders: DIR/train/CLASS/*, DIR/test/CLASS/* and, where it is there, DIR/val/CLASS/*."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from rcl_fast.train.data.folder_checks import advice, notes, problems, unread
from rcl_fast.train.data.folder_parts import find_part, samples_of
from rcl_fast.train.data.image_files import IMAGE_SUFFIXES
from rcl_fast.train.data.samples import RawDataset, missing_data
from rcl_fast.train.errors import UserError


def image_folder(data: Path | None) -> RawDataset:
    """Returns an image folder as it is: classes in alphabetical order, the images of a class by folder and name.

    Each real file counts once, whatever links lead to it; hidden files and folders don't count. A class is named after
    its folder: composed (NFC), with a byte that is no Unicode as `runtime.files.escaped` has it. Warns of all that is
    left out.

    Raises:
        NotFound: DATA/train or DATA/test is missing.
        UserError: everything that is wrong with the folders, in one list.
    """
    absent = [part for part in ("train", "test") if data is None or not (data / part).is_dir()]
    if data is None or absent:
        expected = [f"{part}/CLASS/IMAGE" for part in absent]
        raise missing_data("folder", data, expected, f"Image formats: {' '.join(IMAGE_SUFFIXES)}{advice(data, absent)}")
    parts = {part: find_part(data / part) for part in ("train", "val", "test") if os.path.lexists(data / part)}
    wrong = [*problems(parts)]
    if wrong:
        raise UserError("\n  ".join([f"{data}: this can't be trained on as it is:", *wrong]))
    for note in [*notes(parts), *unread(data)]:
        warnings.warn(note, stacklevel=2)
    names = [*parts["train"].classes]
    samples = {part: samples_of(of, names) for part, of in parts.items()}
    return RawDataset(samples["train"], samples["test"], names, validation=samples.get("val"))
