"""Which checkpoints a run goes on from: each part is damaged in turn, and nothing is loaded unless all fit."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from rcl_fast.train.config import parse
from rcl_fast.train.errors import UserError
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Loader, StateMismatch, loader_state
from rcl_fast.train.loop.resuming import Unfit, check_weights, resume_training
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.runtime.hardware import choose_runtime

Case = tuple[Training, Loader, dict[str, Any]]
ROW = {"epoch": 1, "loss": 1.0, "balanced_accuracy": 0.5, "images_per_second": 1.0, "waiting_for_data": 0.0}


@pytest.fixture(scope="module")
def case() -> Case:
    """A run of BCL+RCL, its loader, and its state after an epoch of one step."""
    config = parse(["--epochs", "4", "--device", "cpu", "--loader", "device", "--batch-size", "24"])
    runtime, splits = choose_runtime(config.run), build.load(config)
    training, loader = start_training(config, splits, runtime), build.training_loader(config, splits, runtime)
    train_step(training, next(iter(loader.epoch(0))))
    training.schedule.step()
    training.class_accuracy = torch.zeros(10)
    training.end_epoch(dict(ROW))
    return training, loader, {**training.state_dict(), "loader": loader_state(loader, 1, 0)}


def test_a_whole_checkpoint_is_loaded(case: Case) -> None:
    training, loader, state = case
    with torch.no_grad():
        training.model.classifier.weight += 1
    resume_training(training, loader, deepcopy(state))
    assert training.epoch == 1


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def harm(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return harm


MOMENTUM = ("optimizer", "state", 0)
GROUP = ("optimizer", "param_groups", 0)
STEPS = {"milestones": {}, "gamma": 0.1, "base_lrs": [0.1], "last_epoch": 1}
STEPPED = {"steps": 1, "images": 24, "totals": {}}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (at("model", "classifier.weight", value=torch.ones(9, 64)), r"classifier\.weight is float32 \[9, 64\] there"),
        (at("model", "classifier.weight", value=torch.ones(10, 64).double()), r"classifier\.weight is float64"),
        (at("model", "classifier.weight", value=None), r"classifier\.weight is no tensor"),
        (at("model", "classifier.bias", value=torch.full((10,), torch.nan)), r"not finite: classifier\.bias"),
        (at(*MOMENTUM, "momentum_buffer", value=torch.ones(1)), r"momentum \[1\] for parameter 0, .* \[16, 3, 3, 3\]"),
        (at(*MOMENTUM, "momentum_buffer", value=torch.full((16, 3, 3, 3), torch.inf)), "momentum that is not finite"),
        (at(*MOMENTUM, value={}), "momentum missing for parameter 0"),
        (at("optimizer", "state", value={}), "momentum missing for parameter 0"),
        (at("optimizer", "param_groups", value=[]), "other parameters or settings"),
        (at(*GROUP, "params", value=[0, 1]), "other parameters or settings"),
        (at(*GROUP, "momentum", value=0.5), "other parameters or settings"),
        (at(*GROUP, "lr", value=None), "no learning rate"),
        (at("schedule", value=STEPS), "the schedule is another one"),
        (at("schedule", "last_epoch", value=3), "after epoch 1, and its schedule after 3"),
        (at("objective", "unknown", value=torch.ones(1)), "the loss's state"),
        (at("compression", value=torch.ones(3)), "the loss's state"),
        (at("class_accuracy", value=torch.ones(3)), "accuracy of 3 classes"),
        (at("scaler", value={"x": 1}), "fp16's scaling"),
        (at("random_states", value=[]), "the random state of 0 processes"),
        (at("random_states", value=[{"torch": torch.ones(3)}]), "a random state is none"),
        (at("epoch", value=2), "after epoch 2 and 0 steps, and its loader elsewhere"),
        (at("progress", value=STEPPED), "after epoch 1 and 1 steps, and its loader elsewhere"),
        (at("progress", value={"pages": 1}), "the progress of its epoch is none"),
        (at("best_epoch", value=2), "the best one 2"),
        (at("history", value=[]), "its history"),
        (at("history", 0, value={"epoch": 1}), "its history"),
        (at("notes", value=[1]), "its notes"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_loaded(case: Case, harm: Callable[[dict], None], said: str) -> None:
    training, loader, whole = case
    state = deepcopy(whole)
    harm(state)
    before = training.model.classifier.weight.detach().clone()
    with pytest.raises(Unfit, match=said):
        resume_training(training, loader, state)
    assert torch.equal(training.model.classifier.weight, before)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda state: state.pop("of"), "an earlier version"),
        (at("of", "loss", value="ce"), "of another run: loss 'ce', not 'bcl_rcl'"),
        (at("class_counts", value=torch.ones(3)), "3 images of 3 classes"),
        (at("loader", "identity", "processes", value="2"), r"processes \(was 2, now 1\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_no_damaged_one(case: Case, harm: Callable[[dict], None], said: str) -> None:
    training, loader, whole = case
    state = deepcopy(whole)
    harm(state)
    state["model"] = {}
    with pytest.raises((UserError, StateMismatch), match=said) as refused:
        resume_training(training, loader, state)
    assert not isinstance(refused.value, Unfit)


def test_before_any_step_an_earlier_version_had_no_momentum(case: Case) -> None:
    training, loader, whole = case
    state = {**deepcopy(whole), "epoch": 0, "best_epoch": 0, "history": []}
    state["optimizer"]["state"] = {}
    state["loader"]["epoch"] = state["schedule"]["last_epoch"] = 0
    resume_training(training, loader, state)
    assert not training.optimizer.state_dict()["state"][0]["momentum_buffer"].any()


def test_weights_of_any_other_network_are_said(case: Case) -> None:
    with pytest.raises(Unfit, match=r"the checkpoint does not fit this network: backbone\..* is missing there"):
        check_weights({}, case[0].model)
