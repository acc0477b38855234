from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rcl_fast.train.config import parse
from rcl_fast.train.loaders import build
from rcl_fast.train.loop.evaluation import Evaluation, evaluate
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.network import models
from rcl_fast.train.runtime.hardware import choose_runtime


class Small(nn.Module):
    """Dynamo compiles no network that is PyTorch's own to the last module."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(images)).relu().mean(dim=(2, 3))


def test_evaluation_of_a_compiled_network_compiles_nothing_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a last batch that is smaller than the others, between steps of training, which go on with their graph."""
    graphs: list[Any] = []

    def counted(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    monkeypatch.setattr(models, "build_backbone", lambda _: (Small(), 8))
    torch.compiler.reset()
    flags = ["--device", "cpu", "--loader", "device", "--loss", "ce", "--batch-size", "96", "--output", str(tmp_path)]
    config = parse([*flags, "--compile"])
    runtime = choose_runtime(config.run)
    splits = build.load(config)
    assert len(splits.test) % 96
    test = build.evaluation_loader(config, splits.test, runtime)
    keep_features = torch.ones(len(splits.test), dtype=torch.bool)

    def evaluated(training: Training) -> Evaluation:
        return evaluate(training.model, test, splits.num_classes, runtime, keep_features)

    compiled, plain = start_training(config, splits, runtime), start_training(parse(flags), splits, runtime)
    batches = build.training_loader(config, splits, runtime).epoch(0)
    for _ in range(2):
        compiled.ddp_model.train()
        train_step(compiled, next(batches))
        plain.model.load_state_dict(compiled.model.state_dict())
        for found, expected in zip(evaluated(compiled), evaluated(plain), strict=True):
            assert torch.equal(found, expected)
    assert len(graphs) == 1
