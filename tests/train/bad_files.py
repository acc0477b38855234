"""Image files as people have them: unusual ones that are as good as any, and bad ones."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = {
    "plain.jpg": ("JPEG", "RGB"),
    "gray.jpg": ("JPEG", "L"),
    "cmyk.jpg": ("JPEG", "CMYK"),
    "16 bits.png": ("PNG", "I;16"),
    "palette.png": ("PNG", "P"),
    "alpha.png": ("PNG", "RGBA"),
    "gray alpha.png": ("PNG", "LA"),
    "picture.webp": ("WEBP", "RGB"),
    "picture.gif": ("GIF", "P"),
    "really a png.jpg": ("PNG", "RGB"),
    'größe 3/[red] 猫, "x".png': ("PNG", "RGB"),
}
"""Files that decode: their format, and Pillow's mode of them."""

BAD = {
    "missing.jpg": "there is no such file",
    "empty.jpg": "the file is empty",
    "text.jpg": "UnidentifiedImageError",
    "half.jpg": "OSError: image file is truncated",
    "half.png": "OSError: image file is truncated",
    "half.webp": "OSError",
    "huge.ppm": "DecompressionBombError",
    "folder.jpg": "it is a folder or a device",
    "pipe.jpg": "it is a folder or a device",
}
"""Files that don't, and how verify.py's word for it starts."""

SIZE = (48, 32)  # width, height


def write_odd_files(folder: Path) -> None:
    """Everything of GOOD and BAD into `folder`; the good ones are SIZE, their pixels noise."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8))
    palette = picture.quantize(16)
    (folder / "größe 3").mkdir(parents=True)
    picture.save(folder / "plain.jpg")
    picture.convert("L").save(folder / "gray.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)).save(
        folder / "16 bits.png"
    )
    palette.save(folder / "palette.png", transparency=bytes(range(0, 256, 16)))
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("LA").save(folder / "gray alpha.png")
    picture.save(folder / "picture.webp")
    palette.save(folder / "picture.gif")
    picture.save(folder / "really a png.jpg", format="PNG")
    picture.save(folder / "größe 3" / '[red] 猫, "x".png')

    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("<html>404</html>\n")
    for kind in ("jpg", "png", "webp"):
        content = io.BytesIO()
        picture.save(content, {"jpg": "JPEG"}.get(kind, kind))
        (folder / f"half.{kind}").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    (folder / "huge.ppm").write_bytes(b"P6 20000 20000 255\n")  # twice Pillow's limit, by its header
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")


def flip_a_byte(path: Path) -> None:
    """Damage in the middle of a JPEG's scan, which decodes all the same."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
