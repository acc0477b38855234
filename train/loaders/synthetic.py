"""Noise on the device, to measure how fast training is when it never waits for data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rcl_fast.train.loaders.base import Batch, LoaderSpec, fingerprint


class SyntheticLoader:
    """A Loader of one batch of normal noise, with the labels of an epoch's first batch, again and again."""

    def __init__(self, spec: LoaderSpec, device: torch.device) -> None:
        self.steps_per_epoch = len(spec.batches(0))
        self.fingerprint = fingerprint(spec, "synthetic")
        index = torch.from_numpy(spec.batches(0)[0])
        side = spec.options.image_size
        generator = torch.Generator(device).manual_seed(spec.seed)
        noise = (torch.randn(len(index), 3, side, side, generator=generator, device=device) for _ in spec.kinds)
        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in noise)
        self._batch = Batch(views, torch.from_numpy(spec.samples.labels)[index], index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for _ in range(start, self.steps_per_epoch):
            yield self._batch
