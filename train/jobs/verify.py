"""Verifying a data set: every image is decoded once, the bad ones are named, and a manifest of all is written."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rcl_fast.metrics import FEW_BELOW, MANY_ABOVE
from rcl_fast.train.arguments import ranges
from rcl_fast.train.config import recipe
from rcl_fast.train.data.datasets import check_trainable, load_noting_warnings, load_splits, read_raw
from rcl_fast.train.data.lists import LISTS
from rcl_fast.train.data.manifest import (
    Changes,
    Entry,
    changes,
    default_file,
    read_manifest,
    relative,
    write_manifest,
)
from rcl_fast.train.data.samples import RawDataset, Samples, describe
from rcl_fast.train.data.scan import CHUNK, scan
from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.options import VerifyOptions
from rcl_fast.train.runtime.console import print_table, print_text
from rcl_fast.train.runtime.threads import usable_cpus
from rcl_fast.train.runtime.wording import counted, first_lines, some

CLASSES_SHOWN = 20  # a data set of more classes gets a summary


def verify(options: VerifyOptions) -> int:
    """Verifies, writes the manifest, prints the results; returns the exit status. Raises UserError if it can't."""
    ranges.check(options)
    if options.dataset in (*LISTS, "folder"):
        return _verify_files(options)
    imbalance = recipe(options.dataset, "bcl_rcl").data.imbalance
    splits = load_noting_warnings(partial(load_splits, options.dataset, options.data, imbalance=imbalance))
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    entries = [Entry("", part, int(label)) for part, samples in parts.items() for label in samples.labels]
    _show_splits(entries, {})
    _show_classes(entries, splits.class_names)
    print_text(
        f"This is {options.dataset} as a run has it by default; the best epoch is selected on {splits.selected_on}.\n"
        "It is read into memory, which has just checked every image: it needs no manifest.",
    )
    return 0


class ImageRef(NamedTuple):
    """One image of a RawDataset."""

    split: str
    samples: Samples
    position: int


def _verify_files(options: VerifyOptions) -> int:
    raw = load_noting_warnings(partial(read_raw, options.dataset, options.data))
    data = options.data or Path()  # without a folder, `_load` has raised
    file = options.manifest or default_file(data)
    _check_writable(file)
    before = (
        load_noting_warnings(partial(read_manifest, options.dataset, data, options.manifest)) if file.exists() else None
    )
    images = list(_image_refs(raw))
    unseen = [
        Entry(relative(samples.images[position], data), split, int(samples.labels[position]))
        for split, samples, position in images
    ]
    print_text(f"{options.dataset}: {len(images):,} images to decode")
    try:
        workers = usable_cpus() if options.workers is None else options.workers
        entries = list(_watched(scan(unseen, data, workers), len(unseen)))
        since = changes(before, entries) if before else Changes([], [], [])
        _write(file, entries, keep_earlier=bool(since.changed))
    except KeyboardInterrupt:
        raise UserError(f"interrupted: {f'{file} is as it was' if before else 'no manifest was written'}") from None
    _show_splits(entries, LISTS[options.dataset].sizes if options.dataset in LISTS else {})
    _show_classes(entries, raw.class_names)
    _show_formats(entries)
    _show_copies(entries, raw.class_names)
    if before:
        _show_changes(since, _earlier(file))
    _show_bad([(image, entry.error) for image, entry in zip(images, entries, strict=True) if entry.error])
    print_text(f"manifest: {file}")
    good = not since.changed and not any(entry.error for entry in entries)
    return 0 if _is_trainable(raw) and good else 1


def _is_trainable(raw: RawDataset) -> bool:
    """Returns whether a run would take the data set, and prints why it would not."""
    try:
        check_trainable(raw)
    except UserError as error:
        print_text(f"a run would refuse it: {error}")
        return False
    return True


def _image_refs(raw: RawDataset) -> Iterator[ImageRef]:
    parts = {"train": raw.train, "validation": raw.validation, "test": raw.test}
    for split, samples in parts.items():
        if samples is not None:
            yield from (ImageRef(split, samples, position) for position in range(len(samples)))


def _check_writable(file: Path) -> None:
    """Raises NotWritten where the file can't be written: now, and not after an hour of decoding."""
    try:
        if file.is_dir():
            raise IsADirectoryError("that is a folder")
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise _not_written(file, error) from error


def _write(file: Path, entries: Sequence[Entry], *, keep_earlier: bool) -> None:
    try:
        if keep_earlier:
            shutil.copyfile(file, _earlier(file))
        write_manifest(file, entries)
    except OSError as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> NotWritten:
    return NotWritten(
        f"the manifest can't be written to {file} ({error}): name a file elsewhere with --manifest PATH, "
        "and give train/run.py the same"
    )


def _earlier(file: Path) -> Path:
    return file.with_name(file.name + ".earlier")


def _watched(entries: Iterable[Entry], total: int) -> Iterator[Entry]:
    """Gives the same entries, and shows a progress bar meanwhile."""
    columns = (BarColumn(), TextColumn("{task.fields[status]}"), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=rich.get_console(), transient=True) as progress:
        task = progress.add_task("", total=total, status="starting")
        bad = 0
        for done, entry in enumerate(entries, start=1):
            bad += entry.error is not None
            if done % CHUNK == 0:
                rate = progress.tasks[0].speed or 0
                status = f"{done:,} of {total:,}  {rate:,.0f} img/s  {bad:,} bad"
                progress.update(task, completed=done, status=status)
            yield entry


def _show_splits(entries: Sequence[Entry], published: dict[str, int]) -> None:
    counts = Counter(entry.split for entry in entries)
    bad = Counter(entry.split for entry in entries if entry.error)
    table = _table("", "images", *["published"] * bool(published), "bad")
    for split, count in counts.items():
        sizes = [f"{published[split]:,}"] if published else []
        table.add_row(split, f"{count:,}", *sizes, f"{bad[split]:,}")
    print_table(table)


def _show_classes(entries: Sequence[Entry], names: Sequence[str]) -> None:
    """Prints how many images of each class decode, or a summary where the classes are many."""
    labels: dict[str, list[int]] = defaultdict(list)
    for entry in entries:
        labels[entry.split] += [] if entry.error else [entry.label]
    counts = {split: np.bincount(np.array(own, np.int64), minlength=len(names)) for split, own in labels.items()}
    train = counts["train"]
    if len(names) <= CLASSES_SHOWN:
        table = _table("class", *counts)
        for name, *row in zip(names, *counts.values(), strict=True):
            table.add_row(Text(name), *(f"{count:,}" for count in row))
    else:
        table = _table("training images a class", "classes", "images")
        for group, of_group in {
            f"many (> {MANY_ABOVE})": train > MANY_ABOVE,
            f"medium ({FEW_BELOW} to {MANY_ABOVE})": (train >= FEW_BELOW) & (train <= MANY_ABOVE),
            f"few (< {FEW_BELOW})": train < FEW_BELOW,
        }.items():
            table.add_row(group, f"{of_group.sum():,}", f"{train[of_group].sum():,}")
    print_table(table)
    largest, smallest = int(train.argmax()), int(train.argmin())
    print_text(
        f"{counted(names, 'class', 'classes')}; training images that decode: "
        f"{train[largest]:,} ({names[largest]}) down to {train[smallest]:,} ({names[smallest]})",
    )
    for split, of_split in counts.items():
        empty = [name for name, count in zip(names, of_split, strict=True) if count == 0]
        if empty:
            print_text(f"{split} has no image that decodes of {some(empty)}")


def _show_formats(entries: Sequence[Entry]) -> None:
    """Prints the formats of the files by Pillow's names; a rare one may be there by mistake."""
    formats = Counter(f"{entry.format} {entry.mode}" for entry in entries if not entry.error)
    print_text("formats: " + ", ".join(f"{what} {count:,}" for what, count in formats.most_common()))


def _show_copies(entries: Sequence[Entry], names: Sequence[str]) -> None:
    """Prints which images are the same, byte for byte, where that makes figures better or labels wrong."""
    first: dict[str, dict[str | None, Entry]] = {"train": {}, "validation": {}}
    copies: dict[str, list[str]] = defaultdict(list)
    for entry in entries:  # training images come first, then those to validate on
        if entry.error:
            continue
        others = [(split, known[entry.sha256]) for split, known in first.items() if entry.sha256 in known]
        for split, of in others:
            if split != entry.split:
                copies[f"of {entry.split} also in {split}"].append(f"{entry.path} is {of.path}")
            elif entry.label != of.label:
                both = f"{entry.path} is {of.path}: {names[entry.label]}, {names[of.label]}"
                copies[f"of {split} in two classes"].append(both)
        first.get(entry.split, {}).setdefault(entry.sha256, entry)
    for what, lines in copies.items():
        print_text(f"{counted(lines, 'image')} {what}, byte for byte: {some(lines)}")


def _show_changes(since: Changes, earlier: Path) -> None:
    print_text(
        "since the earlier manifest: " + ", ".join(f"{len(paths):,} {what}" for what, paths in since._asdict().items()),
    )
    for what, paths in since._asdict().items():
        if paths:
            print_text(f"  {what}: {some(paths)}")
    if since.changed:
        print_text(f"  the earlier manifest is kept as {earlier}")


def _show_bad(bad: Sequence[tuple[ImageRef, str]]) -> None:
    if not bad:
        print_text("every image decodes")
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for (_, samples, position), error in bad:
        kinds[_kind(error)].append(f"{describe(samples, position)}: {error}")
    table = _table("bad files", "files")
    for kind, lines in kinds.items():
        table.add_row(kind, f"{len(lines):,}")
    print_table(table)
    for kind, lines in kinds.items():
        print_text(
            "\n  ".join([kind, *first_lines(lines)]),
        )
    print_text("mend them and verify again, or train without them: train/run.py --on-bad-image skip")


_KINDS = {
    "there is no such file": "missing",
    "the file is empty": "empty",
    "it is a folder": "a folder or a device",
    "UnidentifiedImageError": "no image, or of an unknown format",
    "OSError: image file is truncated": "truncated",
    "OSError: Truncated File Read": "truncated",
    "DecompressionBombError": "too many pixels",
    "it has ": "too elongated",
    "pixels of 32 bits": "32 bits a channel",
    "PermissionError": "not permitted to read",
}


def _kind(error: str) -> str:
    return next((kind for start, kind in _KINDS.items() if error.startswith(start)), "damaged")


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
