"""`python -m rcl_fast.train COMMAND ...`: the five commands by one name."""

from __future__ import annotations

import sys

from rcl_fast.train import reproduce, run, second_stage, sweep, verify

COMMANDS = {
    "run": run.main,
    "verify": verify.main,
    "second-stage": second_stage.main,
    "sweep": sweep.main,
    "reproduce": reproduce.main,
}

_USAGE = f"""python -m rcl_fast.train COMMAND ...

COMMAND is one of {", ".join(COMMANDS)}; each explains itself with --help."""


def main() -> None:
    """Runs the command that the first argument names, with the other arguments."""
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name not in COMMANDS:
        print(_USAGE)
        sys.exit(0 if name in ("-h", "--help") else 2)
    sys.exit(COMMANDS[name](arguments))


if __name__ == "__main__":
    main()
