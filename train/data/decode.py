"""Decoding an image file, by Pillow: verify.py checks this, and every loader makes the same of what it calls good."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile

from rcl_fast.train.errors import UserError

MAX_ELONGATION = 100  # evaluation resizes the shorter side, and the longer one with it: 20,000 x 2 would take gigabytes

warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of oddities in files that it can read


@contextmanager
def opened(path: str) -> Iterator[ImageFile.ImageFile]:
    """Opens an image file, of which only the header is read yet; the content decides the format, not the name.

    Raises UserError for an image that no view can be made of, and almost anything else for a damaged one.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a named pipe would wait forever
        raise UserError("it is a folder or a device, not a file")
    with Image.open(path) as image:
        width, height = image.size
        if max(width, height) > MAX_ELONGATION * min(width, height):
            raise UserError(
                f"it has {width}x{height} pixels, one side over {MAX_ELONGATION} times the other: "
                "crop it, or leave it out"
            )
        if image.mode in ("I", "F"):
            raise UserError(
                f"pixels of 32 bits (mode {image.mode}) have no agreed range: convert them to 8 bits a channel"
            )
        yield image


def rgb(image: Image.Image) -> Image.Image:
    """Returns an opened image as RGB of 8 bits a channel, decoded; Pillow would clip 16-bit gray to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGB")


def cause(path: str, error: Exception) -> str:
    """Returns words for why a file can't be decoded."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UserError):
        return str(error)
    if os.path.isfile(path) and os.path.getsize(path) == 0:  # pathlib's methods raise for a name that no file can have
        return "the file is empty"
    return f"{type(error).__name__}: {error}"
