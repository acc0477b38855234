"""What is wrong with an image folder, what is left out of it, and what its names may have meant: in words."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rcl_fast.train.data.folder_parts import Part
from rcl_fast.train.data.image_files import READERS, Identity, ImageFiles
from rcl_fast.train.runtime.wording import counted, some


def problems(parts: Mapping[str, Part]) -> Iterator[str]:
    """Gives a sentence for each reason why the folders are no data set."""
    train = parts["train"]
    for name, part in parts.items():
        yield from part.problems
        if not any(files.images for files in part.classes.values()):
            if not part.problems:
                yield _without_images(name, part)
            continue
        yield from _shared_by_classes(part)
        if name == "train":
            empty = [f"{_quoted(of)} ({_contents(files)})" for of, files in part.classes.items() if not files.images]
            if empty:
                yield f"{part.folder} has {counted(empty, 'class', 'classes')} without an image: {some(empty)}"
        else:
            # A class without training images is named above, once.
            unknown = [of for of in part.classes if part.holding(of) and of not in train.classes]
            if unknown:
                each = [f"{_quoted(of)} ({counted(part.classes[of].images, 'image')})" for of in unknown]
                yield f"{part.folder} has {counted(each, 'class', 'classes')} that {train.folder} lacks: {some(each)}"
                near = [_quoted(of) for of in train.classes if _plain(of) in map(_plain, unknown)]
                if near:
                    yield f"{train.folder} has classes of almost these names: {some(near)}"


def _quoted(name: str) -> str:
    """Returns a class's name, in quotes where spaces at its ends would not be seen."""
    return name if name == name.strip() else repr(name)


def _plain(name: str) -> str:
    return name.strip().casefold()


def _without_images(name: str, part: Part) -> str:
    if part.loose:
        return (
            f"{part.folder} has {counted(part.loose, 'image')} of no class: "
            "put those of each class into a folder of its name"
        )
    left_out = sum((files.left_out for files in part.classes.values()), Counter[str]())
    also = f" ({_by_suffix(left_out)})" if left_out else ""
    mend = "; remove it, and a share of train is held out" if name == "val" else ""
    return f"{part.folder} has no image{also}{mend}"


def _shared_by_classes(part: Part) -> Iterator[str]:
    """Gives a sentence where links lead to one file from two classes: its label would be both."""
    first: dict[Identity, tuple[str, str]] = {}
    shared: list[str] = []
    for name, files in part.classes.items():
        for path, identity in files.images.items():
            if identity is None:
                continue
            other, of_other = first.setdefault(identity, (name, path))
            if other != name:
                shared.append(f"{path} is {of_other}")
    if shared:
        yield f"{part.folder} has {counted(shared, 'file')} in two classes at once, by links: {some(shared)}"


def notes(parts: Mapping[str, Part]) -> Iterator[str]:
    """Gives a sentence for each kind of thing that is left out, and for what is seldom meant."""
    files = [files for part in parts.values() for files in part.classes.values()]
    left_out = sum((of.left_out for of in files), Counter[str]())
    if left_out:
        yield f"left out, as they are no images by their suffix: {_by_suffix(left_out)}; PNG and JPEG are"
    for what, paths in {
        "hidden folders are left out": [path for part in parts.values() for path in part.hidden]
        + [path for of in files for path in of.hidden],
        "links to what is there already, or to a folder above, are not followed": [
            p for of in files for p in of.repeated
        ],
        "images beside the folders of the classes are left out": [p for part in parts.values() for p in part.loose],
    }.items():
        if paths:
            yield f"{what}: {some(paths)}"
    for part in parts.values():
        missing = [of for of in parts["train"].classes if not part.holding(of)]
        if missing:
            yield f"{part.folder} has no images of: {some(missing)}"
    for one, other in itertools.combinations(parts.values(), 2):
        yield from _in_both(one, other)


def _in_both(one: Part, other: Part) -> Iterator[str]:
    """Gives a sentence where links lead to one file from two parts, which makes figures better than they are."""
    identities = {identity: path for files in one.classes.values() for path, identity in files.images.items()}
    both = [
        f"{path} is {identities[identity]}"
        for files in other.classes.values()
        for path, identity in files.images.items()
        if identity is not None and identity in identities
    ]
    if both:
        yield f"in {one.folder} and in {other.folder}, by links: {counted(both, 'file')}: {some(both)}"


def unread(data: Path) -> Iterator[str]:
    """Gives a sentence for a folder that looks like a validation set by another name."""
    other = _by_another_name(data).get("val")
    if other is not None and not (data / "val").is_dir():
        yield f"{other} is not read; to validate on it, rename it to val"


def _by_another_name(data: Path) -> dict[str, Path]:
    """Returns the folders of DATA that other programs would read as its parts, by their names here."""
    found = {}
    for path in sorted(data.iterdir()):
        meant = _OTHER_NAMES.get(path.name.lower())
        if meant is not None and path.name != meant and path.is_dir():
            found[meant] = path
    return found


_OTHER_NAMES = {
    **dict.fromkeys(("train", "training", "train_images"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "test_images"), "test"),
}


def advice(data: Path | None, absent: Sequence[str]) -> str:
    """Returns what to do with folders that are not as expected, as a text to append."""
    if data is None or not data.is_dir():
        return ""
    others = _by_another_name(data)
    lines = [f"{others[part]} is to be called {part}" for part in absent if part in others]
    validation = data / "val" if (data / "val").is_dir() else others.get("val")
    if "test" in absent and "test" not in others and validation is not None:
        lines.append(f"To test on {validation}, rename it to test")
    if len(absent) == 2 and not lines:
        inner = [path for path in sorted(data.iterdir()) if (path / "train").is_dir()]
        if data.name in ("train", "val", "test"):
            lines.append(f"--data takes the folder above: {data.parent}")
        elif inner:
            lines.append(f"{inner[0]} has such folders: --data {inner[0]}")
    return "".join(f"\n{line}" for line in lines)


def _contents(files: ImageFiles) -> str:
    if files.left_out:
        return f"left out: {_by_suffix(files.left_out)}"
    return "only links to folders above, or to what is there already" if files.repeated else "empty"


def _by_suffix(counts: Counter[str]) -> str:
    """Returns how many files of each suffix there are, and which package would read them."""
    packages = {suffix: package for package, suffixes in READERS.items() for suffix in suffixes}
    texts = []
    for suffix, count in counts.most_common():
        reads = f" ({packages[suffix]} reads them)" if suffix in packages else ""
        texts.append(f"{count:,} {_quoted(suffix) or 'without a suffix'}{reads}")
    return ", ".join(texts)
