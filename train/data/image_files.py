"""The image files below a folder: each real file once, no hidden ones, and a record of all that is left out."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".avif")

READERS = {
    "Pillow": (".j2k", ".tga", ".ico", ".psd"),
    "pillow-heif": (".heic", ".heif", ".hif"),
    "pillow-jxl-plugin": (".jxl",),
    "rawpy": (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
    "pydicom": (".dcm",),
    "nibabel": (".nii",),
    "numpy": (".npy", ".npz"),
    "cairosvg": (".svg",),
    "OpenEXR": (".exr",),
    "torchcodec": (".avi", ".mkv", ".mov", ".mp4", ".webm"),
}
"""Packages by the suffixes of the images (or films) that they read, for those who want to convert them."""

_HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")  # folders that systems make, some with copies of images

Identity = tuple[int, int]
"""Device and inode: what two names of one file have in common."""


@dataclass
class ImageFiles:
    """What is below one folder."""

    images: dict[str, Identity | None] = field(default_factory=dict)
    """Paths by folder, then by name; None for a link to nothing."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are no images by their suffix, by suffix."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders and files that are there already, or to a folder above."""
    hidden: list[str] = field(default_factory=list)
    """Hidden folders."""
    unreadable: list[str] = field(default_factory=list)
    """What is wrong with folders that can't be listed, links to nothing, and pipes by an image's name."""


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of that name is no part of a data set: Jupyter's, macOS's, a NAS's."""
    return name.startswith(".") or name in _HIDDEN


def is_image(name: str) -> bool:
    """Returns whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def find_image_files(folder: Path) -> ImageFiles:
    """Returns the image files below a folder, links followed. Nothing on the disk makes this raise."""
    found = ImageFiles()
    entries = list(_walk(folder, found))
    identities: dict[str, Identity | None] = {}
    known: set[Identity] = set()
    for path, identity, _ in sorted(entries, key=lambda entry: entry[2]):  # of a file and links to it, the file
        if identity in known:
            found.repeated.append(path)
            continue
        identities[path] = identity
        if identity is not None:
            known.add(identity)
    found.images = {path: identities[path] for path, _, _ in entries if path in identities}
    return found


def _walk(folder: Path, found: ImageFiles) -> Iterator[tuple[str, Identity | None, bool]]:
    """Gives path, identity, and whether it is a link, of the images, by folder and name; the rest goes to `found`."""
    seen, files_of = _above(folder), dict[str, tuple[int, list[os.DirEntry[str]]]]()
    folders, links = deque([str(folder)]), deque[str]()
    while folders or links:
        here = folders.popleft() if folders else links.popleft()  # links last: what they lead to may be there itself
        identity = _identity(here)
        if identity in seen:
            found.repeated.append(here)
            continue
        try:
            with os.scandir(here) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(f"{here} can't be listed ({error.strerror})")
            continue
        assert identity is not None  # what can be listed is there
        seen.add(identity)
        files_of[here] = identity[0], []
        for entry in inside:
            if not _is_folder(entry):
                files_of[here][1].append(entry)
            elif is_hidden(entry.name):
                found.hidden.append(entry.path)
            else:
                (links if entry.is_symlink() else folders).append(entry.path)
    for _, (device, files) in sorted(files_of.items()):
        yield from _images(files, device, found)


def _images(
    files: Iterable[os.DirEntry[str]], device: int, found: ImageFiles
) -> Iterator[tuple[str, Identity | None, bool]]:
    for entry in files:
        if is_hidden(entry.name):
            continue
        if not is_image(entry.name) and entry.is_symlink() and _identity(entry.path) is None:
            found.unreadable.append(f"{entry.path} is a link to nothing")  # it may have been a folder of images
        elif not is_image(entry.name):
            found.left_out[os.path.splitext(entry.name)[1].lower()] += 1
        elif entry.is_symlink():
            yield entry.path, _identity(entry.path), True
        elif not entry.is_file():
            found.unreadable.append(f"{entry.path} is a pipe or a device, not a file")
        else:
            yield entry.path, (device, entry.inode()), False  # without a call of the system for each


def _above(folder: Path) -> set[Identity]:
    """Returns the folders above, by the path as it is given and by the real one: a link to one would go round."""
    above = {*folder.absolute().parents, *folder.resolve().parents}
    return {identity for path in above if (identity := _identity(str(path))) is not None}


def _identity(path: str) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
