"""The README's code runs, and the commands of all documents are understood."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rcl_fast.train.config import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"^(?:python|torchrun .*|.*`python) train/(\w+)\.py ([^`\n]*?)(?: +#.*| {3,}.*|`.*)?$", re.MULTILINE
)


def commands() -> list[tuple[str, str, str]]:
    """(document, command, its arguments) of each line or span of code that starts a command of the trainer."""
    return [
        (document.name, command, arguments)
        for document in DOCUMENTS
        for command, arguments in COMMAND.findall(document.read_text(encoding="utf-8"))
        if arguments and not arguments.endswith("...")
    ]


COMMANDS = commands()


def test_the_readme_begins_with_two_commands() -> None:
    start = README.split("\n## ")[0]
    assert re.search(r"^make train .*\nmake test ", start, flags=re.MULTILINE)
    assert "**Nothing here has run on a GPU yet" in start


def test_the_loss_in_a_loop_of_ones_own() -> None:
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 6
    names: dict[str, Any] = {
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


def test_the_readmes_lines_on_prototypes_and_compression() -> None:
    from rcl_fast import ContrastiveLoss
    from rcl_fast.heads import PrototypeHead
    from rcl_fast.weights import compression_factors

    spans = re.findall(r"`([^`\n]+)`", README)
    (head,) = (span for span in spans if span.startswith("prototype_head = "))
    (prototypes,) = (span for span in spans if span.startswith("prototypes = "))
    (compression,) = (span for span in spans if span.startswith("criterion.set_compression"))
    names: dict[str, Any] = {
        "PrototypeHead": PrototypeHead,
        "compression_factors": compression_factors,
        "criterion": ContrastiveLoss.preset("bcl_rcl", [9, 4, 2]),
        "class_accuracy": torch.tensor([0.5, 0.1, 0.3]),
        "classifier": nn.Linear(7, 3),
        **{"d": 7, "hidden": 6, "D": 5},
    }
    for line in (head, prototypes, compression):
        exec(line, names)
    assert names["prototypes"].shape == (3, 5)
    assert names["criterion"].compression.tolist() == pytest.approx([0.005, 1, 0.005])


def test_there_are_commands() -> None:
    def count(*names: str) -> int:
        return sum(name == "README.md" and command in names for name, command, _ in COMMANDS)

    assert count("run") >= 6
    assert min(count(name) for name in ("verify", "second_stage", "sweep", "reproduce")) >= 1
    assert {"sweeps.md", "training.md", "reproduction.md", "distributed.md"} <= {name for name, _, _ in COMMANDS}


@pytest.mark.parametrize(
    "arguments",
    [
        arguments
        for _, command, arguments in COMMANDS
        if command == "run" and "--resume" not in arguments and "--help" not in arguments and "NAME" not in arguments
    ],
)
def test_training_commands_parse(arguments: str) -> None:
    assert parse(shlex.split(arguments)).data.data == Path("DIR")


@pytest.mark.parametrize("command", ["run", "verify", "second_stage", "sweep", "reproduce"])
def test_every_option_of_a_command_is_in_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "run":
        with pytest.raises(SystemExit):
            parse(["--help"])
    else:
        with pytest.raises(SystemExit):
            import_module(f"rcl_fast.train.{command}").main(["--help"])
    known = {*re.findall(r"--[\w-]+", capsys.readouterr().out), "--help"}
    given = {
        option
        for _, of, arguments in COMMANDS
        if of == command
        for option in re.findall(r"(?<!\S)--[\w-]+", arguments.split(" -- ")[0].split("--more=")[0])
    }
    assert given <= known


def test_options_after_two_dashes_are_of_the_training() -> None:
    shared = [arguments.split(" -- ")[1] for _, command, arguments in COMMANDS if " -- " in arguments]
    assert shared
    for arguments in shared:
        parse(["--dataset", "digits_lt", *shlex.split(arguments)])
