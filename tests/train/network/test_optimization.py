"""Learning rates by epoch, as the recipes say."""

import dataclasses

import pytest
import torch
from torch import nn

from rcl_fast.train.config import recipe
from rcl_fast.train.network.optimization import build_optimizer, build_schedule, restore
from rcl_fast.train.options import OptimizationOptions


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


def gradients(network: nn.Module, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        # In the weight's layout, as autograd has it.
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=make))


def stepped(optimizer: torch.optim.SGD, network: nn.Module, seeds: range) -> list[torch.Tensor]:
    for seed in seeds:
        gradients(network, seed)
        optimizer.step()
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_momentum_from_zero_is_momentum_from_the_first_step() -> None:
    options = recipe("cifar100_lt", "bcl").optimization
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    theirs = torch.optim.SGD(
        plain.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
    )
    found = stepped(build_optimizer(options, ours), ours, range(3))
    assert all(map(torch.equal, found, stepped(theirs, plain, range(3))))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_of_an_unfused_optimizer_goes_on_fused(steps: int) -> None:
    """As those of before the fused update are: not fused, and without momentum before the first step."""
    options = recipe("cifar100_lt", "bcl").optimization
    network, resumed = nn.Linear(3, 2), nn.Linear(3, 2)
    before = torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    stepped(before, network, range(steps))
    optimizer = build_optimizer(options, resumed)
    resumed.load_state_dict(network.state_dict())
    restore(optimizer, before.state_dict())
    assert [group["fused"] for group in optimizer.param_groups] == [True]
    assert len(optimizer.state) == 2
    expected = stepped(before, network, range(steps, steps + 2))
    for one, other in zip(stepped(optimizer, resumed, range(steps, steps + 2)), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_checkpoint_of_another_memory_layout_goes_on(layout: torch.memory_format) -> None:
    """The fused kernel goes through a weight and its momentum in the order of memory."""
    options = recipe("cifar100_lt", "bcl").optimization
    other = torch.channels_last if layout is torch.contiguous_format else torch.contiguous_format
    network, resumed = (nn.Conv2d(3, 4, 3).to(memory_format=kind) for kind in (layout, other))  # type: ignore[call-overload]
    before, after = build_optimizer(options, network), build_optimizer(options, resumed)
    stepped(before, network, range(2))
    resumed.load_state_dict(network.state_dict())
    restore(after, before.state_dict())
    for one, theirs in zip(stepped(after, resumed, range(2, 4)), stepped(before, network, range(2, 4)), strict=True):
        torch.testing.assert_close(one, theirs)


def test_every_parameter_decays() -> None:
    options = dataclasses.replace(recipe("cifar100_lt", "bcl").optimization)
    optimizer = build_optimizer(options, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4
