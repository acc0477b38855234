"""Batches by torchvision on Pillow images, on the CPU, in worker processes: the reference for the other loaders."""

from __future__ import annotations

import atexit
import multiprocessing
import random
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from rcl_fast.train.data.samples import BadImage, Samples, describe, open_image
from rcl_fast.train.loaders.base import Batch, LoaderSpec, fingerprint
from rcl_fast.train.views.transforms import View, evaluation_view, view

WORKER_GRACE_SECONDS = 60


class TorchvisionLoader:
    """A Loader of float32 views; each is sampled with the seed (seed, epoch, index, view), in whichever worker."""

    def __init__(self, spec: LoaderSpec, *, workers: int, pin_memory: bool = False) -> None:
        transforms = [view(kind, spec.options) for kind in spec.kinds] or [evaluation_view(spec.options)]
        self._batches, self._on_bad = spec.batches, spec.on_bad
        self.steps_per_epoch = len(spec.batches(0))
        self.fingerprint = fingerprint(spec, "torchvision")
        self._empty = _empty(len(transforms), spec.options.image_size)
        self._keys: list[list[tuple[int, int]]] = []
        if workers > 0:
            atexit.register(_kill_workers)
        warnings.filterwarnings("ignore", "This DataLoader will create")  # build.py says it, and once
        self._torch = DataLoader(
            _Views(spec.samples, transforms, spec.seed),
            batch_sampler=self._keys,
            num_workers=workers,  # torch gives each one thread
            persistent_workers=workers > 0,
            worker_init_fn=outlive_in_worker,
            pin_memory=pin_memory,
            collate_fn=_collate,
            generator=torch.Generator(),  # else each epoch would sample from the global one
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        # Workers hold a copy of the views, so the epoch travels with each index.
        self._keys[:] = [[(epoch, int(index)) for index in batch] for batch in self._batches(epoch)[start:]]
        for batch, bad in self._torch:
            for error in bad:
                self._on_bad(error)
            yield self._empty if batch is None else Batch(*batch)


class _Item(NamedTuple):
    """One sample's views, its label and its index in the samples."""

    views: list[Tensor]
    label: int
    position: int


class _Views(Dataset):
    """A Dataset whose item (epoch, index) is that sample in that epoch."""

    def __init__(self, samples: Samples, transforms: Sequence[View], seed: int) -> None:
        self.samples = samples
        self.transforms = transforms
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> _Item | BadImage:
        epoch, index = key
        try:
            image = open_image(self.samples, index)
        except BadImage as error:
            return error  # raised in a worker, it would come out wrapped in the worker's traceback
        views = []
        with _generators_preserved():
            for number, transform in enumerate(self.transforms):
                _seed_generators((self.seed, epoch, index, number))
                try:
                    views.append(transform(image))
                except ValueError as error:
                    return BadImage(f"cannot use {describe(self.samples, index)}: {error}")
        return _Item(views, int(self.samples.labels[index]), index)


_Collated = tuple[tuple[Tensor, ...], Tensor, Tensor]


def _collate(items: list[_Item | BadImage]) -> tuple[_Collated | None, list[BadImage]]:
    """Returns views, labels and indices of the good items (None where there is none), and the errors of the others."""
    good = [item for item in items if not isinstance(item, BadImage)]
    bad = [item for item in items if isinstance(item, BadImage)]
    if not good:
        return None, bad
    views = tuple(default_collate(list(of_one)) for of_one in zip(*(item.views for item in good), strict=True))
    return (views, *(default_collate([getattr(item, name) for item in good]) for name in ("label", "position"))), bad


def _empty(views: int, side: int) -> Batch:
    """Returns a batch of no images."""
    view, numbers = torch.empty(0, 3, side, side), torch.empty(0, dtype=torch.int64)
    return Batch((view,) * views, numbers, numbers)


@contextmanager
def _generators_preserved() -> Iterator[None]:
    """Restores the state of the global CPU generators afterwards; transforms can sample from no others."""
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
    """Keeps a loader's process alive through signals to the whole job, until the run has saved itself."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS) and None)


def _kill_workers() -> None:
    """Ends loaders' processes where an error has left some: Python would send SIGTERM, and wait until they heed it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
