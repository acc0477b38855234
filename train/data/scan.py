"""Decoding every image file once, in parallel, to complete its entry in the manifest."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from rcl_fast.train.data.decode import cause, opened, rgb
from rcl_fast.train.data.manifest import Entry
from rcl_fast.train.errors import UserError

CHUNK = 32  # images that a process is handed at once: some tenths of a second's work


def scan(unseen: Sequence[Entry], data: Path, workers: int) -> Iterator[Entry]:
    """Gives each entry as `scan_file` completes it, in order; `workers` processes do it, or with 0 this one.

    Raises UserError where a process dies.
    """
    look = partial(scan_file, data=data)
    if workers == 0:
        yield from map(look, unseen)
        return
    pool = ProcessPoolExecutor(workers, _processes(), initializer=signal.signal, initargs=_IGNORE_INTERRUPTS)
    done = 0
    try:
        for entry in pool.map(look, unseen, chunksize=CHUNK):
            yield entry
            done += 1
    except BrokenProcessPool as error:
        raise UserError(
            f"a process died, short of memory or of a decoder's crash, on the images from {unseen[done].path} on. "
            "Try again with fewer --workers; 0 decodes one image at a time, in order"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_IGNORE_INTERRUPTS = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one ends the others


def _processes() -> BaseContext:
    """Returns the way to start processes: as copies of one that has imported this module, where the system can.

    That saves seconds for each process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    interrupt = signal.signal(*_IGNORE_INTERRUPTS)
    try:
        forkserver.ensure_running()  # it inherits SIG_IGN, so that Ctrl-C does not end it while it still imports
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return context


def scan_file(entry: Entry, data: Path) -> Entry:
    """Returns the entry, completed from its file below `data`. Nothing in a file makes this raise."""
    path = os.path.join(data, entry.path)
    return replace(entry, **_fingerprint(path), **_decoded(path))


def _fingerprint(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):  # to open a named pipe would wait forever
        return {}
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError:
        return {}
    return {"bytes": size, "sha256": digest.hexdigest()}


def _decoded(path: str) -> dict[str, Any]:
    """Returns what decoding the file shows, or what its header says and why it can't be decoded."""
    known: dict[str, Any] = {}
    try:
        with opened(path) as image:
            known = {"width": image.width, "height": image.height, "mode": image.mode, "format": image.format}
            width, height = rgb(image).size  # a TIFF may be turned as it is decoded
        return known | {"width": width, "height": height}
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        return known | {"error": cause(path, error)}
