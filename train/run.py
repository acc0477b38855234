"""Train a long-tailed classifier: `python train/run.py --help`."""

from __future__ import annotations

import os

if __name__ == "__main__":  # read when PyTorch loads: threads that wait for work then let others run
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from rcl_fast.train import config
from rcl_fast.train.jobs import train
from rcl_fast.train.rundir import restarts


@record  # torchrun then shows the traceback of the process that failed first
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: parse, train, report. Exits with 75 (EX_TEMPFAIL) where a signal stopped it."""
    restarts.forget()
    train.run(config.parse(restarts.arguments(sys.argv[1:] if arguments is None else arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
