"""Writing files whole: there is always the old file or the new one. And what names that are no Unicode become."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON lines and replaces the file as a whole, so that a resumed run leaves no line twice."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a file such that there is always the old one or the new one; what is no Unicode in it as `printable`."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(printable(text), encoding="utf-8")
    os.replace(unfinished, path)


def escaped(name: str) -> str:
    r"""Returns a file name for tables: backslashes doubled, controls and bytes that are no Unicode as \xNN."""
    return printable(_CONTROLS.sub(_spelled, name.replace("\\", "\\\\")))


def printable(text: str) -> str:
    r"""Returns a text that may name files with \xNN for a byte that is no Unicode or commands the terminal."""
    return _UNPRINTABLE.sub(_spelled, text)


_CONTROLS = re.compile("[\x00-\x1f\x7f]")
_UNPRINTABLE = re.compile("[\x1b\ud800-\udfff]")  # Python has a name's byte 0xNN, where it is no UTF-8, as U+DCNN


def _spelled(letter: re.Match[str]) -> str:
    code = ord(letter[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{byte:02x}" if byte < 0x100 else f"\\u{code:04x}"
