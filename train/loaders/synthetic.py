"""Noise on the device: how fast a trainer is that never waits for data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rcl_fast.train.loaders.base import Batch, Reading, identity


class SyntheticLoader:
    """A Loader of one batch of normal noise, with the labels of an epoch's first batch, again and again."""

    def __init__(self, reading: Reading, device: torch.device) -> None:
        self.steps_per_epoch = len(reading.batches(0))
        self.identity = identity(reading, "synthetic")
        index = torch.from_numpy(reading.batches(0)[0])
        side = reading.options.image_size
        generator = torch.Generator(device).manual_seed(reading.seed)
        self._batch: Batch = {"label": torch.from_numpy(reading.samples.labels)[index], "index": index}
        for number in range(1, len(reading.kinds) + 1):
            noise = torch.randn(len(index), 3, side, side, generator=generator, device=device)
            self._batch[f"x{number}"] = noise.contiguous(memory_format=torch.channels_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for _ in range(start, self.steps_per_epoch):
            yield dict(self._batch)
