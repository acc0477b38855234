"""Batches by torchvision on Pillow images, on the CPU, in worker processes: the reference for the other loaders."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from rcl_fast.train.data.samples import BadImage, Samples, describe, open_image
from rcl_fast.train.loaders.base import Batch, Reading, identity
from rcl_fast.train.views.transforms import View, evaluation_view, view

WORKER_GRACE_SECONDS = 60


class TorchvisionLoader:
    """A Loader of float32 views; the draws of a view are seeded by (seed, epoch, index, view), whoever makes it."""

    def __init__(self, reading: Reading, *, workers: int, pin_memory: bool = False) -> None:
        self._batches, self._on_bad = reading.batches, reading.on_bad
        self.steps_per_epoch = len(reading.batches(0))
        self.identity = identity(reading, "torchvision")
        self._keys: list[list[tuple[int, int]]] = []
        transforms = [view(kind, reading.options) for kind in reading.kinds] or [evaluation_view(reading.options)]
        self._torch = DataLoader(
            _Views(reading.samples, transforms, reading.seed),
            batch_sampler=self._keys,
            num_workers=workers,  # torch gives each one thread
            persistent_workers=workers > 0,
            worker_init_fn=outlive_in_worker,
            pin_memory=pin_memory,
            collate_fn=_collate,
            generator=torch.Generator(),  # or each epoch would draw from the global one
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        # Workers hold a copy of the views, so the epoch travels with each index.
        self._keys[:] = [[(epoch, int(index)) for index in batch] for batch in self._batches(epoch)[start:]]
        for batch, bad in self._torch:
            for error in bad:
                self._on_bad(error)
            if batch:
                yield batch


class _Views(Dataset):
    """Item (epoch, index): the views of that sample in that epoch, with its label and index."""

    def __init__(self, samples: Samples, transforms: Sequence[View], seed: int) -> None:
        self.samples = samples
        self.transforms = transforms
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int] | BadImage:
        epoch, index = key
        try:
            image = open_image(self.samples, index)
        except BadImage as error:
            return error  # raised in a worker, it would come out wrapped in the worker's traceback
        item: dict[str, Tensor | int] = {"label": int(self.samples.labels[index]), "index": index}
        with _generators_kept():
            for number, transform in enumerate(self.transforms):
                _seed_generators((self.seed, epoch, index, number))
                try:
                    item[f"x{number + 1}"] = transform(image)
                except ValueError as error:
                    return BadImage(f"cannot use {describe(self.samples, index)}: {error}")
        return item


def _collate(items: list[dict[str, Tensor | int] | BadImage]) -> tuple[Batch, list[BadImage]]:
    """The batch of the good items (empty where there is none), and what is wrong with the others."""
    good = [item for item in items if not isinstance(item, BadImage)]
    return default_collate(good) if good else {}, [item for item in items if isinstance(item, BadImage)]


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Puts the global CPU generators back as they were; transforms can draw from no others."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _seed_generators(entropy: tuple[int, ...]) -> None:
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    torch.default_generator.manual_seed(int(seeds[0]))  # torch.manual_seed would seed the GPUs too
    random.seed(int(seeds[1]))
    np.random.seed(seeds[2])  # noqa: NPY002


def outlive_in_worker(_: int) -> None:
    """In a loader's process: signals that reach the whole job must not end it before the run has saved itself."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS) and None)
