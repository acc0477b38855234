"""Parts of a batch: both passes see the same network, nothing counts twice. Their gradient: test_together.py."""

from pathlib import Path

import torch
from torch import Tensor, nn

from rcl_fast.train.config import parse
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import start_training
from rcl_fast.train.runtime.hardware import choose_runtime

PARTS = 3


def test_both_passes_draw_the_same_and_statistics_move_once(tmp_path: Path) -> None:
    config = parse(["--device", "cpu", "--loader", "device", "--batch-size", "10", "--accumulate", str(PARTS)])
    runtime = choose_runtime(config.run)
    splits = build.load(config)
    training = start_training(config, splits, runtime)
    norm = nn.BatchNorm1d(64)
    training.model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), norm, nn.Dropout(0.5))
    seen: list[Tensor] = []
    training.model.backbone.register_forward_hook(lambda *passed: seen.append(passed[2].detach()))
    batch = next(iter(build.training_loader(config, splits, runtime).epoch(0)))
    losses = train_step(training, batch)

    assert [len(part) for part in seen] == 2 * [3 * 4, 3 * 3, 3 * 3]  # three views of 4 + 3 + 3 images
    for first, second in zip(seen[:PARTS], seen[PARTS:], strict=True):
        assert torch.equal(first, second)
        assert (first == 0).float().mean() > 0.3  # dropout was on
    assert not torch.equal(seen[1], seen[2])
    assert norm.num_batches_tracked == PARTS
    assert training.model.prototype_head is not None
    assert training.model.prototype_head[1].num_batches_tracked == 1
    assert losses.keys() == {"loss", "cross_entropy", "contrastive"}
    assert all(parameter.grad is not None for parameter in training.model.parameters())


def test_a_batch_smaller_than_its_parts_is_cut_into_images() -> None:
    config = parse(["--device", "cpu", "--loss", "ce", "--loader", "device", "--accumulate", "16"])
    runtime = choose_runtime(config.run)
    splits = build.load(config)
    training = start_training(config, splits, runtime)
    batch = next(iter(build.training_loader(config, splits, runtime).epoch(0)))
    losses = train_step(training, Batch(tuple(view[:5] for view in batch.views), batch.labels[:5], batch.indices[:5]))
    assert losses["loss"].isfinite()
