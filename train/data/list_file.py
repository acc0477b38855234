"""A text file of `path label` lines: the images that it lists, and everything that is wrong with it, by line."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rcl_fast.train.data.samples import Samples
from rcl_fast.train.runtime.files import printable
from rcl_fast.train.runtime.wording import SHOWN

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SHOWN_OF_A_LINE = 100  # characters
_MOST_DIGITS = 7  # no data set has ten million classes, and a count of each would fill the memory


class ListFile(NamedTuple):
    """What a list says."""

    samples: Samples  # of the lines that have a path and a label
    problems: list[str]  # each names the file and, where there is one, the line


def read_list(file: Path) -> ListFile:
    """Returns what a list says. Paths are relative to its folder, and may hold spaces. Raises OSError.

    It is UTF-8, with or without a byte-order mark. A path that is none stands for the file of exactly these bytes.
    """
    content = file.read_bytes()
    if content.startswith(_UTF_16) or b"\0" in content[:1000]:
        return ListFile(_samples([], [], []), [f"{file} is UTF-16, or no text: save it as UTF-8"])
    paths, labels, origins, problems = [], [], [], []
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        line = raw.decode("utf-8", "surrogateescape").strip()
        if not line:
            continue
        try:
            path, label = _parsed(line, file.parent)
        except ValueError as error:
            problems.append(f"{file}, line {number}: {error}")
            continue
        paths.append(path)
        labels.append(label)
        origins.append(f"{file.name}, line {number}")
    if not paths and not problems:
        problems.append(f"{file} lists no image: expected lines of `path label`")
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"{file}: {len(problems) - SHOWN:,} more lines can't be read"]
    return ListFile(_samples(paths, labels, origins), problems)


def _parsed(line: str, folder: Path) -> tuple[str, int]:
    """Returns path and label of a line. Raises ValueError with what is wrong."""
    *paths, label = line.rsplit(maxsplit=1)  # the path may hold spaces
    if not paths or paths[0].endswith(",") or not (label.isascii() and label.isdecimal()):
        raise ValueError(f"expected `path label`, the label a number from 0, found {ascii(line)[:_SHOWN_OF_A_LINE]}")
    if len(label) > _MOST_DIGITS:
        raise ValueError(f"no data set has a class {label[:20]}{'...' * (len(label) > 20)}")
    whole = os.path.join(folder, *paths)
    if printable(whole) != whole and not os.path.lexists(whole):
        raise ValueError(f"it is not UTF-8, and there is no file {printable(whole)}: save the list as UTF-8")
    return whole, int(label)


def _samples(paths: list[str], labels: list[int], origins: list[str]) -> Samples:
    return Samples(paths, np.array(labels, np.int64), origins)
