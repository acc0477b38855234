"""What DALI is given of image files: the path of one that it decodes as Pillow does, the decoded pixels of others."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from rcl_fast.train.data.decode import opened
from rcl_fast.train.data.samples import BadImage, Samples, open_image


class Given(NamedTuple):
    """What DALI is given of one file."""

    content: NDArray[np.uint8]
    """The bytes of its path, or those of a PPM, whose pixels DALI decodes exactly."""
    is_path: bool


class DaliFiles:
    """The image files of a loader. A header is read once, in one of `threads` threads, where Pillow decodes, too.

    Args:
        bad: gets the error of each file that can't be decoded. DALI is given a black square of `side` pixels instead.
    """

    def __init__(self, samples: Samples, bad: dict[int, BadImage], *, side: int, threads: int) -> None:
        self._samples = samples
        self._bad = bad
        self._in_place_of_bad = Given(_ppm(Image.new("RGB", (side, side))), is_path=False)
        self._dalis: set[int] = set()
        self._pillows: set[int] = set()
        self._threads = ThreadPoolExecutor(threads)

    def ask(self, indices: Iterable[int]) -> list[Given | Future[Given]]:
        """Returns what DALI is given of each file, or what will be that: reading and decoding have begun."""
        return [self._as_path(i) if i in self._dalis else self._threads.submit(self._look, i) for i in indices]

    def dalis(self, indices: Iterable[int]) -> list[int]:
        """Returns those of the files that DALI decodes by itself."""
        return [index for index in indices if index in self._dalis]

    def leave_to_pillow(self, indices: Iterable[int]) -> None:
        """Has Pillow decode these files from now on."""
        self._dalis.difference_update(indices)
        self._pillows.update(indices)

    def path(self, index: int) -> NDArray[np.uint8]:
        """Returns the bytes of a file's path, which need not be UTF-8."""
        return np.frombuffer(os.fsencode(self._samples.images[index]), np.uint8)

    def _as_path(self, index: int) -> Given:
        return Given(self.path(index), is_path=True)

    def _look(self, index: int) -> Given:
        if index in self._bad:
            return self._in_place_of_bad
        if index not in self._pillows and decodes_alike(self._samples.images[index]):
            self._dalis.add(index)
            return self._as_path(index)
        self._pillows.add(index)
        try:
            return Given(_ppm(open_image(self._samples, index)), is_path=False)
        except BadImage as error:
            self._bad[index] = error
            return self._in_place_of_bad


def decodes_alike(path: str) -> bool:
    """Returns whether DALI's decoder gives Pillow's pixels of this file, if it is whole.

    That was seen with JPEG and PNG, gray or RGB of 8 bits. Elsewhere there are differences: DALI turns no TIFF, rounds
    16 bits otherwise, shows another frame of an animated PNG, and knows nothing of GIF.
    """
    try:
        with opened(path) as image:
            return (
                image.format in ("JPEG", "PNG")
                and _layout(image) in ("RGB", "L")
                and not getattr(image, "is_animated", False)
                and image.info.get("adobe_transform") != 0  # a JPEG of RGB, not YCbCr, which GPUs may not know
            )
    except Exception:  # Pillow is asked to decode it, and will say why it can't
        return False


def _layout(image: ImageFile.ImageFile) -> object:
    """Returns Pillow's name for the pixels as the file has them: "RGB", but for 16 bits "RGB;16B"."""
    name = image.tile[0][3]
    return name[0] if isinstance(name, tuple) else name


def _ppm(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the bytes of a file of the image's pixels as they are."""
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)
