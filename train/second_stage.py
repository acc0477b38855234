"""A second stage on a finished run: `python train/second_stage.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rcl_fast.train.arguments.parsing import parse
from rcl_fast.train.arguments.ranges import hints
from rcl_fast.train.command_line import command
from rcl_fast.train.options import Config, SecondStageOptions

_DESCRIPTION = """Decoupled training: keep a finished run's backbone as it is, and balance its classifier.

The methods are those of Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020:
  crt       classifier re-training: new weights, cross-entropy, every class equally often
  tau_norm  divide each weight row by its norm to the power tau; nothing is trained. The bias is left out, as theirs
  lws       learnable weight scaling: one factor a class on the logits, the rows' directions stay; sampled as crt

Examples:
  train/second_stage.py --run runs/NAME --method crt
  train/second_stage.py --run runs/NAME --method tau_norm               tau is selected on validation
  train/second_stage.py --run runs/NAME --method tau_norm --tau 0.7
  train/second_stage.py --run runs/NAME --method lws --checkpoint last --epochs 5

They are meant for a first stage without any balance in its classifier (train/run.py --loss ce). After a loss with
logit adjustment the classifier is balanced already, and a second stage may well make it worse.

With --classifier cosine only crt is there: a cosine classifier's rows have no norms that tau_norm or lws could change.

In the results' folder: metrics.json (a run's keys, and second_stage), per_class.csv, report.html, and best.pt, which
holds the whole network. crt and lws select their epoch as the run did, on its validation images."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and makes the second stage."""
    with command():
        elsewhere = dict.fromkeys(hints(Config), "it is one of train/run.py, and the run's stays as it was")
        options = parse(
            SecondStageOptions, arguments, prog="train/second_stage.py", description=_DESCRIPTION, elsewhere=elsewhere
        )
        from rcl_fast.train.jobs.second_stage import second_stage  # loads PyTorch, which --help need not wait for

        second_stage(options)


if __name__ == "__main__":
    main(sys.argv[1:])
