"""CIFAR-10-LT or CIFAR-100-LT in one small file, to send to another machine and train there at once.

    python bench/pack.py pack --dataset cifar100_lt --data DIR --imbalance 100 OUT.tar
    python bench/pack.py unpack OUT.tar DIR          then: train/run.py --dataset cifar100_lt --data DIR

`pack` reads the data set as the trainer does (from DIR/cifar100_lt.npz, torchvision's files, or a folder of PNGs), cuts
it at that imbalance, and keeps the whole test set. OUT.tar holds lossless WebP sheets, 100 images one below the other,
and index.json: labels, class names, images of each class, and the sha256 of every array.

`unpack` needs NumPy and Pillow alone. It writes DIR/cifar100_lt.npz, or nothing where a sha256 differs. Runs at
a larger imbalance can use that file too, for smaller sets lie in larger; at a smaller one they are told what is short.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DATASETS = ("cifar10_lt", "cifar100_lt")
PARTS = ("train", "test")
FORMAT = "rcl_fast sheets 1"
INDEX = "index.json"
SIDE = 32  # pixels of an image
SHEET = 100  # images of a sheet; what else was tried is in docs/data.md
WEBP = {"lossless": True, "exact": True, "quality": 80, "method": 6}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit with what went wrong."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "pack":
            print(pack(options.dataset, options.data, options.imbalance, options.output))
        else:
            print(unpack(options.packed, options.folder))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="bench/pack.py", description=__doc__, formatter_class=form)
    commands = whole.add_subparsers(dest="command", required=True, metavar="pack|unpack")
    one = commands.add_parser(
        "pack", help="write OUT.tar; takes minutes", description="A data set into one small file."
    )
    one.add_argument("--dataset", choices=DATASETS, default="cifar100_lt", help="data set (default: %(default)s)")
    one.add_argument("--data", type=Path, required=True, metavar="DIR", help="its folder, as for train/run.py")
    one.add_argument(
        "--imbalance",
        type=float,
        default=100.0,
        metavar="FACTOR",
        help="largest class over smallest (default: %(default)g)",
    )
    one.add_argument("output", type=Path, metavar="OUT.tar", help="file to write")
    other = commands.add_parser(
        "unpack", help="write DIR/NAME.npz; takes seconds", description="That file into arrays for --data DIR."
    )
    other.add_argument("packed", type=Path, metavar="OUT.tar", help="file that `pack` has written")
    other.add_argument("folder", type=Path, metavar="DIR", help="folder to write into; made where there is none")
    return whole


def pack(dataset: str, data: Path, imbalance: float, output: Path) -> str:
    """Writes `output`; returns a line on it. Raises FileNotFoundError and ValueError as the trainer does for `data`."""
    from rcl_fast.train.data.cifar import cifar_lt  # here, so that `unpack` does without the trainer

    published = cifar_lt(dataset, data, imbalance, "exponential")
    arrays: dict[str, NDArray[Any]] = {"class_names": np.array(published.class_names)}
    for part, samples in zip(PARTS, (published.train, published.test), strict=True):
        arrays |= {part: samples.images, f"{part}_labels": samples.labels}
    unfinished = output.with_name(output.name + ".unfinished")
    sheets = {
        name: arrays[part][SHEET * number : SHEET * (number + 1)]
        for part in PARTS
        for number, name in enumerate(sheet_names(part, len(arrays[part])))
    }
    with (
        tarfile.open(unfinished, "w") as archive,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        closing(pool.map(encode, sheets.values())) as encoded,  # so that Ctrl-C leaves the rest
    ):
        add(archive, INDEX, json.dumps(index_of(dataset, imbalance, arrays)).encode())
        for name, content in zip(sheets, watched(encoded, len(sheets)), strict=True):
            add(archive, name, content)
    os.replace(unfinished, output)
    return f"{output}: {sizes(arrays)}, {output.stat().st_size:,} bytes"


def unpack(packed: Path, folder: Path) -> str:
    """Writes the npz file; returns a line on it. Raises ValueError where `packed` is damaged, cut short or foreign."""
    try:
        dataset, arrays = unpacked(read(packed))
    except ValueError as error:
        raise ValueError(f"{packed}: {error}. Nothing was written: copy it again, or pack it again") from error
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{dataset}.npz"
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("wb") as opened:
        np.savez(opened, **arrays)
    os.replace(unfinished, file)
    return f"{file}: {sizes(arrays)}, as they were packed"


def unpacked(members: dict[str, bytes]) -> tuple[str, dict[str, NDArray[Any]]]:
    """Returns the data set's name and its five arrays; raises ValueError naming what is missing or differs."""
    index = read_index(members)
    names = {part: sheet_names(part, len(index.arrays[f"{part}_labels"])) for part in PARTS}
    missing = [name for part in PARTS for name in names[part] if name not in members]
    if missing:
        raise ValueError(f"it is incomplete, {len(missing)} sheets are missing, the first is {missing[0]}")
    sheets = {part: [decode(name, members[name]) for name in names[part]] for part in PARTS}
    arrays = {**{part: np.concatenate(sheets[part]) for part in PARTS}, **index.arrays}
    differing = [name for name, array in arrays.items() if digest(array) != index.sha256[name]]
    if differing:
        raise ValueError(f"it is damaged, the sha256 differs of: {', '.join(differing)}")
    return index.dataset, arrays


class Index(NamedTuple):
    """What index.json says."""

    dataset: str
    arrays: dict[str, NDArray[Any]]
    """train_labels, test_labels int64 [n], class_names [C]."""
    sha256: dict[str, str]
    """Of each array's bytes, the pixels' too."""


def index_of(dataset: str, imbalance: float, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "dataset": dataset,
        "imbalance": imbalance,
        "counts": {part: np.bincount(arrays[f"{part}_labels"]).tolist() for part in PARTS},  # for people
        "sha256": {name: digest(array) for name, array in arrays.items()},
        **{name: array.tolist() for name, array in arrays.items() if name not in PARTS},
    }


def read_index(members: dict[str, bytes]) -> Index:
    if INDEX not in members:
        raise ValueError(f"it is no uncompressed tar file made by bench/pack.py, or is cut short: it has no {INDEX}")
    try:
        found = json.loads(members[INDEX])
        if found["format"] != FORMAT or found["dataset"] not in DATASETS:
            raise ValueError(f"it is {found['format']!r} of {found['dataset']!r}, and {FORMAT!r} is expected")
        arrays = {f"{part}_labels": np.array(found[f"{part}_labels"], np.int64) for part in PARTS}
        arrays["class_names"] = np.array(found["class_names"])
        return Index(found["dataset"], arrays, {name: found["sha256"][name] for name in (*arrays, *PARTS)})
    except Exception as error:  # damaged bytes make any other JSON
        raise ValueError(f"its {INDEX} can't be read ({type(error).__name__}: {error})") from error


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def read(packed: Path) -> dict[str, bytes]:
    """Returns a tar file's members by name: those before its end where it is cut short, none of another file."""
    members = {}
    with suppress(tarfile.ReadError), tarfile.open(packed, "r:") as archive:  # what is missing is named later
        for member in archive:
            opened = archive.extractfile(member)
            members[member.name] = opened.read() if opened else b""
    return members


def sheet_names(part: str, images: int) -> list[str]:
    return [f"{part}/{number:04}.webp" for number in range(-(-images // SHEET))]


def encode(images: NDArray[np.uint8]) -> bytes:
    """Returns images, uint8 [n, 32, 32, 3], as one WebP file."""
    content = io.BytesIO()
    Image.fromarray(images.reshape(-1, SIDE, 3)).save(content, "WEBP", **WEBP)
    return content.getvalue()


def decode(name: str, content: bytes) -> NDArray[np.uint8]:
    """Returns the images, uint8 [n, 32, 32, 3], of sheet `name`; raises ValueError where it is damaged."""
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as sheet:
            if sheet.width != SIDE or sheet.height > SHEET * SIDE:
                raise ValueError(f"it has {sheet.width}x{sheet.height} pixels")
            return np.asarray(sheet.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {error})") from error


def digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def sizes(arrays: dict[str, NDArray[Any]]) -> str:
    return " + ".join(f"{part} {len(arrays[part]):,}" for part in PARTS) + " images"


def watched(sheets: Iterable[bytes], total: int) -> Iterable[bytes]:
    """Returns the same sheets, with a progress bar while they come, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        print(f"packing {total} sheets", file=sys.stderr)
        return sheets
    return track(sheets, "packing", total, console=Console(stderr=True))


if __name__ == "__main__":
    main()
