"""Decode every image of a data set once, and name the bad ones: `python train/verify.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rcl_fast.train.arguments.parsing import parse
from rcl_fast.train.arguments.ranges import hints
from rcl_fast.train.command_line import command
from rcl_fast.train.options import Config, VerifyOptions

_DESCRIPTION = """Decode every image of a data set once, name the bad ones, and write a manifest of all.

Examples:
  train/verify.py --dataset imagenet_lt --data DIR                        the lists and images below DIR
  train/verify.py --data DIR                                              your own images
  train/verify.py --dataset places_lt --data DIR --manifest places.jsonl  where DIR is read-only

The manifest has a line of JSON for each image: path, split, label, width, height, mode, format, bytes, sha256, and of
a bad one the error. With it, train/run.py --on-bad-image skip leaves the bad ones out. Where there is a manifest
already, the files that have changed since are named, too: damage that still decodes shows in the sha256 alone.

The exit status is 0 where every image decodes and none has changed, else 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and verifies; returns the exit status."""
    with command():
        elsewhere = dict.fromkeys(hints(Config), "it is one of train/run.py")
        options = parse(VerifyOptions, arguments, prog="train/verify.py", description=_DESCRIPTION, elsewhere=elsewhere)
        from rcl_fast.train.jobs.verify import verify  # loads the data sets, which --help need not wait for

        return verify(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
