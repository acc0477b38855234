"""Labelled images, wherever they lie: as files, or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rcl_fast.train.data.decode import cause, opened, rgb
from rcl_fast.train.errors import NotFound, UserError


class BadImage(UserError):
    """An image file that cannot be read; the message names the file, where it was listed, and the cause."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Images and their classes."""

    images: Sequence[str] | NDArray[np.uint8]
    """Paths, or the pixels themselves: uint8 [n, H, W, 3]."""
    labels: NDArray[np.int64]
    """[n], from 0."""
    origins: Sequence[str] | None = None
    """Where each image was listed, for error messages: "ImageNet_LT_train.txt, line 17"."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class RawDataset:
    """A data set before anything is held out; `validation` is None where it has none of its own."""

    train: Samples
    test: Samples
    class_names: list[str]
    validation: Samples | None = None


def subset(samples: Samples, indices: NDArray[np.int64]) -> Samples:
    """Returns the samples at `indices`, in that order."""
    images, origins = samples.images, samples.origins
    return Samples(
        images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices],
        samples.labels[indices],
        origins and [origins[i] for i in indices],
    )


def open_image(samples: Samples, index: int) -> Image.Image:
    """Returns sample `index` as a decoded RGB image. Raises BadImage where its file can't be decoded."""
    image = samples.images[index]
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with opened(image) as file:
            return rgb(file)
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise BadImage(f"cannot read {describe(samples, index)}: {cause(image, error)}") from error


def describe(samples: Samples, index: int) -> str:
    """Returns words for sample `index`: its path and where it was listed, or its number."""
    image = samples.images[index]
    if isinstance(image, np.ndarray):
        return f"image {index}"
    return f"the image {image}" + (f" ({samples.origins[index]})" if samples.origins else "")


def missing_data(name: str, data: Path | None, expected: Sequence[str], how: str) -> NotFound:
    """Returns the error for a data set whose paths `expected` are not below `data`; `how` says how to get them."""
    where = f"not found below {data}" if data is not None else "no data folder was given; --data DIR should hold"
    if data is not None and not data.is_dir():
        where += f", which is {'a file' if data.exists() else 'not there'}"
    return NotFound("\n".join([f"{name}: {where}:", *(f"  {path}" for path in expected), how]))
