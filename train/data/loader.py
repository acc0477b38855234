"""Samples to batches of views on the CPU; which samples and which draws is a pure function of seed and position."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from rcl_fast.train.data.samples import BadImage, Samples, describe, open_image
from rcl_fast.train.data.views import View

Batch = dict[str, Tensor]
"""`x1` (and `x2`, `x3`) float32 [b, 3, S, S], `label` int64 [b], `index` int64 [b]: positions in the samples."""


class Loader(Protocol):
    """Gives this rank's batches, epoch after epoch."""

    steps_per_epoch: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of that epoch, whatever epochs were asked for before. Raises BadImage."""
        ...


def training_batches(
    n: int, *, epoch: int, seed: int, batch_size: int, rank: int = 0, world: int = 1, drop_last: bool = True
) -> list[NDArray[np.int64]]:
    """This rank's indices into `n` samples, step by step: its equal slice of each shuffled batch of `batch_size`.

    The rest that fills no batch is dropped or, with drop_last=False or where it is all there is, sliced near-equally.
    A rest smaller than `world` is always dropped: every rank takes part in every step. Raises ValueError where
    `batch_size` is not a multiple of `world`, or `n` is below `world`.
    """
    _local_batch(batch_size, world)
    if n < world:
        raise ValueError(f"{n} training samples cannot be shared by {world} processes")
    order = np.random.default_rng((seed, epoch)).permutation(n)
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    rest = n % batch_size
    if rest and len(batches) > 1 and (drop_last or rest < world):
        batches.pop()
    return [np.array_split(batch, world)[rank] for batch in batches]


def evaluation_batches(n: int, *, batch_size: int, rank: int = 0, world: int = 1) -> list[NDArray[np.int64]]:
    """This rank's indices, in order: each of `n` samples once over all ranks, at most `batch_size` in a global step.

    Every rank takes the same number of steps, so long as none has less than one sample or a batch below two.
    """
    local = _local_batch(batch_size, world)
    steps = -(-n // (world * local))
    mine = np.array_split(np.arange(n), world)[rank]
    return [batch for batch in np.array_split(mine, max(steps, 1)) if len(batch)]


def training_loader(
    samples: Samples,
    transforms: Sequence[View],
    *,
    batch_size: int,
    workers: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
    pin_memory: bool = False,
) -> Loader:
    """Shuffled batches of the views that `transforms` make (x1, x2, ...); `batch_size` is that of all ranks."""
    batches = partial(
        training_batches,
        len(samples),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world=world,
        drop_last=drop_last,
    )
    return _TorchLoader(_Views(samples, transforms, seed), batches, workers, pin_memory)


def evaluation_loader(
    samples: Samples,
    transform: View,
    *,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Each sample once over all ranks, in order, the same in every epoch; `batch_size` is that of all ranks."""
    mine = evaluation_batches(len(samples), batch_size=batch_size, rank=rank, world=world)
    return _TorchLoader(_Views(samples, [transform], seed=0), lambda epoch: mine, workers, pin_memory)


class _TorchLoader:
    """A Loader over torch's DataLoader, whose workers live as long as it does."""

    def __init__(
        self,
        views: "_Views",
        batches: Callable[..., list[NDArray[np.int64]]],
        workers: int,
        pin_memory: bool,
    ) -> None:
        self._batches = batches
        self.steps_per_epoch = len(batches(epoch=0))
        self._keys: list[list[tuple[int, int]]] = []
        self._torch = DataLoader(
            views,
            batch_sampler=self._keys,
            num_workers=workers,  # torch gives each one thread
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            generator=torch.Generator(),  # or each epoch would draw from the global one
        )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        # Workers hold a copy of `views`, so the epoch travels with each index.
        self._keys[:] = [[(epoch, int(index)) for index in batch] for batch in self._batches(epoch=epoch)]
        for batch in self._torch:
            if isinstance(batch, BadImage):
                raise batch
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


def _collate(items: list[dict[str, Tensor | int] | BadImage]) -> Batch | BadImage:
    bad = [item for item in items if isinstance(item, BadImage)]
    return bad[0] if bad else default_collate(items)


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


def _local_batch(batch_size: int, world: int) -> int:
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size {batch_size} (of all processes together) is not a multiple of {world}")
    return batch_size // world
