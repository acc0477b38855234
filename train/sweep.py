"""A search over options of the trainer, each trial a run on the queue: `python train/sweep.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rcl_fast.train.arguments.parsing import check, parse
from rcl_fast.train.arguments.ranges import hints
from rcl_fast.train.command_line import command
from rcl_fast.train.options import Config, SweepOptions

_DESCRIPTION = """Search over options of train/run.py; each trial is a run.

Examples:
  train/sweep.py --dataset cifar100_lt --data DIR --study runs/a --grid tau=1.0,1.3,1.5 compression_rest=0.005,0.05
  train/sweep.py --dataset digits_lt --study runs/lr --grid lr=0.01..0.5:log --sampler tpe --trials 20
  train/sweep.py --dataset digits_lt --study runs/tau --grid tau=0,1 -- --epochs 20 --loss bcl_rcl

Options after -- are options of train/run.py that all trials share.

What counts is the balanced accuracy on validation of a trial's best epoch. The test set's is shown beside it, and
chooses nothing, unless --validate-on test makes the two the same.

Trials run on every GPU of the machine, or on its CPU, --jobs-per-device at once. The same command again goes on with
the study: finished trials are not repeated, and a trial that was stopped or killed goes on from its last checkpoint.
Several machines that see the same folder share a study: run the same command on each. A trial whose loss diverges
counts as done. Exit status: 0 where all trials are done, 1 where one failed or another call is still at it, 75 after
SIGTERM and 130 after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the trials; the exit status tells what became of them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    with command():
        options = parse(
            SweepOptions,
            given[:end],
            prog="train/sweep.py",
            description=_DESCRIPTION,
            elsewhere={
                name: f"for all trials it stands after --, and to search it, --grid has {name}=VALUES"
                for name in hints(Config)
            },
        )
        check(Config, given[end + 1 :], prog="train/run.py")
        from rcl_fast.train.experiments.job_queue import log_failures
        from rcl_fast.train.experiments.sweep import sweep  # loads PyTorch, which --help need not wait for

        sys.exit(log_failures(sweep(options, given[end + 1 :])))


if __name__ == "__main__":
    main(sys.argv[1:])
