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
    """Runs the command that the first argument names, with the others."""
    given = (sys.argv[1:2] or [""])[0]
    if given in ("-h", "--help"):
        print(_USAGE)
        sys.exit()
    command = COMMANDS.get(given.replace("_", "-"))
    if command is None:
        sys.exit(f"there is no command {given!r}\n\n{_USAGE}" if given else _USAGE)
    sys.exit(command(sys.argv[2:]))


if __name__ == "__main__":
    main()
