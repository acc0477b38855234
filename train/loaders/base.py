"""What a loader is: this rank's batches of views, from any step of any epoch on, and a position that can be saved."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rcl_fast.train.data.samples import BadImage, Samples
from rcl_fast.train.loaders.sampler import class_balanced_batches, evaluation_batches, training_batches
from rcl_fast.train.options import ViewKind, ViewOptions

Batch = dict[str, Tensor]
"""`x1` (and `x2`, `x3`) [b, 3, S, S], normalised, on the loader's device; `label` and `index` (positions in the
samples) int64 [b], on the CPU."""


def raise_it(error: BadImage) -> None:
    """What to do with a bad image, unless the reading says otherwise."""
    raise error


class StateMismatch(ValueError):
    """A saved position is one in other batches; the message says what differs."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a loader reads: which samples, in which order, and as which views."""

    samples: Samples
    kinds: tuple[ViewKind, ...]
    """Of x1, x2, ...; empty: x1 is the one view of evaluation, which nothing random is in."""
    options: ViewOptions
    seed: int
    batches: Callable[[int], list[NDArray[np.int64]]]
    """Epoch -> this rank's indices into the samples, step by step; as many steps in every epoch."""
    batch_size: int
    """Of all ranks together."""
    world: int
    drop_last: bool = False
    on_bad: Callable[[BadImage], None] = raise_it
    """Called for an image that can't be read; where it returns, the batch goes on without that image."""


class Loader(Protocol):
    """Gives this rank's batches, epoch after epoch."""

    steps_per_epoch: int
    identity: dict[str, str]
    """What the batches depend on, by the name that a person knows it by."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of that epoch from step `start` on, whatever was asked for before."""
        ...


def training_reading(
    samples: Samples,
    kinds: tuple[ViewKind, ...],
    options: ViewOptions,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
    on_bad: Callable[[BadImage], None] = raise_it,
) -> Reading:
    """Shuffled batches, anew in each epoch. Raises ValueError where `training_batches` does."""
    batches = partial(
        training_batches, len(samples), seed=seed, batch_size=batch_size, rank=rank, world=world, drop_last=drop_last
    )
    return Reading(
        samples, kinds, options, seed, lambda epoch: batches(epoch=epoch), batch_size, world, drop_last, on_bad
    )


def balanced_reading(
    samples: Samples,
    kinds: tuple[ViewKind, ...],
    options: ViewOptions,
    *,
    seed: int,
    batch_size: int,
    on_bad: Callable[[BadImage], None] = raise_it,
) -> Reading:
    """Each class equally often in an epoch, for one process."""
    batches = partial(class_balanced_batches, samples.labels, seed=seed, batch_size=batch_size)
    return Reading(
        samples, kinds, options, seed, lambda epoch: batches(epoch=epoch), batch_size, 1, drop_last=True, on_bad=on_bad
    )


def evaluation_reading(
    samples: Samples,
    options: ViewOptions,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    on_bad: Callable[[BadImage], None] = raise_it,
) -> Reading:
    """Each sample once over all ranks, in order, the same in every epoch."""
    mine = evaluation_batches(len(samples), batch_size=batch_size, rank=rank, world=world)
    return Reading(samples, (), options, 0, lambda epoch: mine, batch_size, world, on_bad=on_bad)


def identity(reading: Reading, pipeline: str) -> dict[str, str]:
    """A loader's identity; `pipeline` names what makes its pixels."""
    return {
        "loader": pipeline,
        "images and labels": f"{len(reading.samples):,}, sha256 {_digest(reading.samples)}",
        "views": f"{', '.join(reading.kinds)} of {reading.options}",
        "seed": str(reading.seed),
        "batch size": str(reading.batch_size),
        "processes": str(reading.world),
        "last partial batch": "dropped" if reading.drop_last else "kept",
    }


def state(loader: Loader, epoch: int, step: int) -> dict[str, Any]:
    """The position before step `step` of an epoch, as plain values for a checkpoint."""
    return {"epoch": epoch, "step": step, "identity": loader.identity}


def position(loader: Loader, saved: dict[str, Any]) -> tuple[int, int]:
    """(epoch, step) of a saved state; raises StateMismatch where this loader would go on with other batches."""
    before = saved["identity"]
    differing = [
        f"{name} (was {before.get(name)}, now {value})"
        for name, value in loader.identity.items()
        if before.get(name) != value
    ]
    if differing:
        raise StateMismatch(f"the saved position is one in other batches: {'; '.join(differing)}")
    return saved["epoch"], saved["step"]


def _digest(samples: Samples) -> str:
    """Of the labels, and of the pixels or the files' names below their common folder, which may have moved."""
    digest = hashlib.sha256(np.ascontiguousarray(samples.labels).tobytes())
    if isinstance(samples.images, np.ndarray):
        digest.update(np.ascontiguousarray(samples.images).data)
    elif len(samples):
        folder = os.path.commonpath([os.path.dirname(path) for path in samples.images])
        digest.update("\0".join(path[len(folder) :] for path in samples.images).encode())
    return digest.hexdigest()[:16]
