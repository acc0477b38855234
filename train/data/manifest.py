"""The manifest that train/verify.py writes: reading it, comparing two of them, and training without the bad files."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcl_fast.train.data.samples import BadImage, Samples, describe, subset
from rcl_fast.train.errors import NotFound, UserError
from rcl_fast.train.runtime.files import write_lines
from rcl_fast.train.runtime.wording import counted, first_lines


@dataclass(frozen=True)
class Entry:
    """One listed image, and its file as it was when it was verified; None: unknown."""

    path: str
    """Below the data folder, or as it was listed where it lies elsewhere."""
    split: str
    label: int
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    """Pillow's name for the pixels before they become RGB: "L", "CMYK", "I;16", ..."""
    format: str | None = None
    """By the content, not by the file's name: "JPEG", "PNG", ..."""
    bytes: int | None = None
    sha256: str | None = None
    error: str | None = None
    """Why the file is bad; None: it decodes."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """What is known of a data set's files."""

    file: Path
    data: Path
    entries: dict[str, Entry]
    """By `Entry.path`."""
    made_with: str
    """The command that makes it anew."""


class Changes(NamedTuple):
    """The paths that differ between two manifests, by their hashes: flipped bytes may decode without an error."""

    changed: list[str]
    gone: list[str]
    new: list[str]


def default_file(data: Path) -> Path:
    """Returns the place of the manifest of the folder `data`, unless --manifest names another."""
    return data / "rcl_fast_manifest.jsonl"


def verify_command(dataset: str, data: Path | None, manifest: Path | None = None) -> str:
    """Returns the command that decodes every image of a data set once, and writes the manifest."""
    folder = "" if data is None else f" --data {shlex.quote(str(data))}"
    return f"python train/verify.py --dataset {dataset}{folder}" + (
        f" --manifest {shlex.quote(str(manifest))}" if manifest is not None else ""
    )


def read_manifest(dataset: str, data: Path, file: Path | None = None) -> Manifest:
    """Returns the manifest of `data`, read from `file` or from its default place.

    Raises NotFound with the command that makes it, UserError naming the line that is no entry.
    """
    made_with = verify_command(dataset, data, file)
    file = file or default_file(data)
    if not file.is_file():
        raise NotFound(f"there is no manifest {file}; this makes it:\n  {made_with}")
    entries = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            entry = _entry(line)
            if entry is None:
                raise UserError(f"{file}, line {number}, is none of a manifest: move it away, then\n  {made_with}")
            entries[entry.path] = entry
    return Manifest(file, data, entries, made_with)


def _entry(line: bytes) -> Entry | None:
    """Returns the entry of a line; None where it is none."""
    try:
        entry = Entry(**json.loads(line))
    except (TypeError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry.path, str) and isinstance(entry.error, str | None) else None


def write_manifest(file: Path, entries: Sequence[Entry]) -> None:
    """Writes the manifest as JSON lines: numbers stay numbers, and file names that are not UTF-8 survive."""
    write_lines(file, [vars(entry) for entry in entries])


def relative(path: str, data: Path) -> str:
    """Returns `Entry.path` for a path of `Samples`: below `data`, so that folder and manifest can move together."""
    return path.removeprefix(os.path.join(data, ""))


def changes(before: Manifest, now: Sequence[Entry]) -> Changes:
    """Returns what became of the files of an earlier manifest; a file that can't be read counts as gone."""
    old = {entry.path: entry.sha256 for entry in before.entries.values() if entry.sha256}
    new = {entry.path: entry.sha256 for entry in now if entry.sha256}
    return Changes(
        changed=[path for path in old if path in new and new[path] != old[path]],
        gone=[path for path in old if path not in new],
        new=[path for path in new if path not in old],
    )


def check_readable(parts: Mapping[str, Samples], manifest: Manifest) -> None:
    """Raises BadImage, before hours of training, where the manifest knows samples as bad.

    It goes by the manifest alone, whatever has become of the files since, so that one manifest always gives the same
    answer. Looking at each file would take minutes over a network, and training stops at a bad file anyway.
    """
    bad = [
        f"{part}: {line}"
        for part, samples in parts.items()
        for line in _described(samples, manifest, _known_bad(samples, manifest))
    ]
    if bad:
        images = sum(map(len, parts.values()))
        raise BadImage(
            "\n  ".join([f"{manifest.file}: {len(bad):,} of {images:,} images are bad:", *first_lines(bad)])
            + f"\nTrain without them: --on-bad-image skip. Or mend them, and verify again:\n  {manifest.made_with}"
        )


def unknown_indices(samples: Samples, manifest: Manifest) -> list[int]:
    """Returns the indices of the samples that the manifest does not have: it is older, or of other files."""
    return [index for index, path in enumerate(_paths(samples, manifest)) if path not in manifest.entries]


def bad_indices(samples: Samples, manifest: Manifest) -> NDArray[np.int64]:
    """Returns the indices of the samples that the manifest knows as bad.

    Raises UserError naming the first sample that the manifest does not have.
    """
    unknown = unknown_indices(samples, manifest)
    if unknown:
        raise UserError(
            f"{manifest.file} does not have {describe(samples, unknown[0])}: "
            f"it is of other files; this makes it anew:\n  {manifest.made_with}"
        )
    return _known_bad(samples, manifest)


def without_bad(samples: Samples, manifest: Manifest, class_names: Sequence[str]) -> tuple[Samples, list[str]]:
    """Returns the samples that are not bad, and a line for each that was left out, with the cause.

    Raises UserError where `bad_indices` does, and where a class would lose all its images.
    """
    bad = bad_indices(samples, manifest)
    if len(bad) == 0:
        return samples, []
    kept = np.setdiff1d(np.arange(len(samples)), bad)
    lost = np.setdiff1d(samples.labels, samples.labels[kept])
    if len(lost):
        index = int(np.flatnonzero(samples.labels == lost[0])[0])
        others = f", and so it is with {counted(lost[1:], 'more class', 'more classes')}" if len(lost) > 1 else ""
        raise UserError(
            f"every image of class {class_names[lost[0]]!r} is bad, such as {describe(samples, index)}{others}: "
            f"skipping them leaves nothing of it. All bad files are in {manifest.file}"
        )
    return subset(samples, kept), _described(samples, manifest, bad)


def _paths(samples: Samples, manifest: Manifest) -> list[str]:
    """Returns `Entry.path` of each sample; none for images in memory, which were read when they were loaded."""
    if isinstance(samples.images, np.ndarray):
        return []
    return [relative(path, manifest.data) for path in samples.images]


def _known_bad(samples: Samples, manifest: Manifest) -> NDArray[np.int64]:
    bad = {path for path, entry in manifest.entries.items() if entry.error is not None}
    return np.array([index for index, path in enumerate(_paths(samples, manifest)) if path in bad], np.int64)


def _described(samples: Samples, manifest: Manifest, bad: NDArray[np.int64]) -> list[str]:
    paths = _paths(samples, manifest)
    return [f"{describe(samples, index)}: {manifest.entries[paths[index]].error}" for index in bad]
