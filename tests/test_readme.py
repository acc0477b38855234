"""The README's code runs and its commands parse."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from rcl_fast.train.config import parse

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_loss_in_a_loop_of_ones_own() -> None:
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 6
    names = {
        "class_counts": [9, 4, 2],
        "device": "cpu",
        "loader": [(torch.randn(4, 2, 3, 8, 8), torch.tensor([0, 1, 2, 0]))],
        "backbone": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "head": nn.Linear(3, 5),
        "prototypes": torch.randn(3, 5),
    }
    exec(code, names)
    names["loss"].backward()
    assert names["head"].weight.grad.abs().sum() > 0


COMMANDS = re.findall(r"^(?:python|torchrun .*) train/run\.py (.*?)(?: +#.*)?$", README, flags=re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--resume" not in c and "--help" not in c])
def test_commands_parse(command: str) -> None:
    assert parse(shlex.split(command)).data.data == Path("DIR")
