"""Train a long-tailed classifier: `python train/run.py --help`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from rcl_fast.train.command_line import command, exit_with_message
from rcl_fast.train.config import parse
from rcl_fast.train.options import Config
from rcl_fast.train.rundir import restarts, result_files

_logger = logging.getLogger("rcl_fast")  # this module's name is another where it is a script


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains and reports. Exits with 75 (EX_TEMPFAIL) where a signal stopped the run."""
    with command():
        restarts.forget()
        config = parse(restarts.arguments(sys.argv[1:] if arguments is None else arguments))
        if not _is_done(config):
            _train_recorded(config) if "TORCHELASTIC_ERROR_FILE" in os.environ else _train(config)


def _is_done(config: Config) -> bool:
    """Returns whether the run to go on with is finished, and says so once; each of torchrun's processes looks."""
    folder = config.run.resume
    if folder is None or not result_files.nothing_is_left(folder, config.optimization.epochs):
        return False
    if os.environ.get("RANK", "0") == "0":
        figures, report = folder / result_files.METRICS, folder / result_files.REPORT
        _logger.info(f"{folder} is finished: nothing is left to do\nfigures: {figures}; report: {report}")
    return True


def _train(config: Config) -> None:
    from rcl_fast.train.jobs import train  # loads PyTorch, which --help and a typo need not wait for

    train.run(config)


def _train_recorded(config: Config) -> None:
    """Trains such that torchrun shows the traceback of the process that failed first, where there is need of one."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from rcl_fast.train.runtime import signals

    @record
    def recorded() -> None:
        with exit_with_message():  # an error for people has no traceback to show
            _train(config)

    signals.stop_with_parent()
    recorded()


if __name__ == "__main__":
    main(sys.argv[1:])
