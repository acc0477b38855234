"""Steps that change nothing are left out and said: those whose images are all bad, and those that fp16 skips."""

from collections.abc import Iterator

import pytest
import torch

from rcl_fast.train.config import parse
from rcl_fast.train.data.samples import BadImage
from rcl_fast.train.errors import NonFiniteLoss, Preempted
from rcl_fast.train.jobs.second_stage import train_classifier_epoch
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch, Loader
from rcl_fast.train.loop import engine
from rcl_fast.train.loop.evaluation import evaluate
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.rundir.logs import SilentLog
from rcl_fast.train.runtime.hardware import choose_runtime


class WithBadSteps:
    """The batches of a loader, with all images of some steps left out."""

    def __init__(self, loader: Loader, bad: set[int]) -> None:
        self.steps_per_epoch, self.fingerprint = loader.steps_per_epoch, loader.fingerprint
        self._loader, self._bad = loader, bad

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(self._loader.epoch(epoch, start), start=start):
            kept = 0 if step in self._bad else len(batch.labels)
            yield Batch(tuple(view[:kept] for view in batch.views), batch.labels[:kept], batch.indices[:kept])


def begun(*arguments: str, bad: set[int]) -> tuple[Training, WithBadSteps]:
    """Four steps an epoch."""
    config = parse(["--device", "cpu", "--loader", "device", "--loss", "ce", "--batch-size", "90", *arguments])
    runtime, splits = choose_runtime(config.run), build.load(config)
    loader = build.training_loader(config, splits, runtime)
    assert loader.steps_per_epoch == 4
    return start_training(config, splits, runtime), WithBadSteps(loader, bad)


def test_a_step_without_images_is_left_out_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    training, loader = begun(bad={0, 2})
    figures = engine.train_epoch(training, loader, SilentLog())
    assert training.progress is not None
    assert (training.progress.steps, training.progress.skipped, training.progress.images) == (4, 2, 180)
    assert figures["loss"] > 0
    assert "epoch 1: 2 of 4 steps were left out" in capsys.readouterr().out


def test_a_run_resumed_after_such_a_step_goes_on_with_the_right_one() -> None:
    whole, loader = begun(bad={0, 2})
    engine.train_epoch(whole, loader, SilentLog())
    stopped, loader = begun(bad={0, 2})
    asked = iter([False, False, False, True])
    with pytest.raises(Preempted):
        engine.train_epoch(stopped, loader, SilentLog(), should_stop=lambda: next(asked))
    resumed, loader = begun(bad={0, 2})
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.progress is not None
    assert resumed.progress.steps == 3
    engine.train_epoch(resumed, loader, SilentLog())
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_epoch_without_images_ends_the_run() -> None:
    training, loader = begun(bad={0, 1, 2, 3})
    before = [parameter.clone() for parameter in training.model.parameters()]
    with pytest.raises(BadImage, match=r"no step of epoch 1 has an image .* in all 4 .*verify\.py --dataset digits_lt"):
        engine.train_epoch(training, loader, SilentLog())
    assert all(torch.equal(one, other) for one, other in zip(before, training.model.parameters(), strict=True))


def test_an_evaluation_without_images_is_refused_and_one_with_some_counts_these() -> None:
    training, loader = begun(bad={1, 3})
    kept = torch.ones(1000, dtype=torch.bool)
    found = evaluate(training.model, loader, 10, training.runtime, kept)
    assert int(found.confusion.sum()) == len(found.features) == len(found.labels) == 180
    training, loader = begun(bad={0, 1, 2, 3})
    with pytest.raises(BadImage, match="no image to evaluate on"):
        evaluate(training.model, loader, 10, training.runtime, kept)


def test_a_second_stage_leaves_such_steps_out_too() -> None:
    training, loader = begun(bad={1})
    model, optimizer = training.model, torch.optim.SGD(training.model.classifier.parameters(), lr=0.1)
    row = train_classifier_epoch(model.classifier, model.backbone, optimizer, loader.epoch(0), training.runtime)
    assert row["loss"] > 0
    _, loader = begun(bad={0, 1, 2, 3})
    with pytest.raises(BadImage, match="no image to train the classifier on"):
        train_classifier_epoch(model.classifier, model.backbone, optimizer, loader.epoch(0), training.runtime)


# Updates that fp16's scaling leaves out.


def test_updates_that_fp16_leaves_out_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    training, loader = begun("--precision", "fp16", bad={1, 2, 3})
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # no gradient in fp16 survives this
    before, scale = training.model.classifier.weight.detach().clone(), training.scaler.get_scale()
    engine.train_epoch(training, loader, SilentLog())
    engine._check_scale(training, scale)
    assert torch.equal(training.model.classifier.weight, before)
    assert "fp16: at least 1 of the 4 updates of epoch 1 were left out" in capsys.readouterr().out
    engine._check_scale(training, training.scaler.get_scale())
    assert capsys.readouterr().out == ""


def test_a_scale_of_nothing_ends_the_run() -> None:
    training, _ = begun("--precision", "fp16", bad=set())
    training.scaler = torch.amp.GradScaler("cpu", init_scale=0.0)
    with pytest.raises(NonFiniteLoss, match="gradients in fp16 are not finite in epoch 1"):
        engine._check_scale(training, 1.0)
