"""Learning rates by epoch, as the recipes say."""

import dataclasses

import pytest
import torch
from torch import nn

from rcl_fast.train.config import OptimizationOptions, recipe
from rcl_fast.train.optimization import build_optimizer, build_schedule


def rates(options: OptimizationOptions) -> list[float]:
    optimizer = build_optimizer(options, nn.Linear(2, 2))
    schedule = build_schedule(options, optimizer)
    found = []
    for _ in range(options.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cifar_warms_up_and_steps_at_160_and_180() -> None:
    found = rates(recipe("cifar100_lt", "bcl_rcl").optimization)
    assert found[:6] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2, 0.2])
    assert found[159:161] == pytest.approx([0.2, 0.02])
    assert found[179:181] == pytest.approx([0.02, 0.002])


def test_imagenet_follows_a_cosine_from_the_first_epoch() -> None:
    found = rates(recipe("imagenet_lt", "bcl_rcl").optimization)
    expected = 0.05 * (1 + torch.cos(torch.arange(90) / 90 * torch.pi))
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_runs_shorter_than_their_warm_up_work(epochs: int, schedule: str) -> None:
    options = OptimizationOptions(epochs=epochs, warmup_epochs=5, schedule=schedule, lr=0.1)  # type: ignore[arg-type]
    found = rates(options)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in found)
    assert max(found) == pytest.approx(0.1)


def test_every_parameter_decays() -> None:
    options = dataclasses.replace(recipe("cifar100_lt", "bcl").optimization)
    optimizer = build_optimizer(options, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4
