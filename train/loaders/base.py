"""What a loader is: it gives this rank's batches of views, from any step of any epoch on. Its state can be saved."""

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


@dataclass(frozen=True, eq=False)
class Batch:
    """The b images of one step: 0 where all of them are bad, and are to be left out."""

    views: tuple[Tensor, ...]
    """x1, or x1, x2, x3: [b, 3, S, S] each, normalised, on the loader's device."""
    labels: Tensor
    """int64 [b], on the CPU."""
    indices: Tensor
    """int64 [b], indices into the samples, on the CPU."""


def raise_it(error: BadImage) -> None:
    """Raises the error, as a loader does with a bad image unless its spec says otherwise."""
    raise error


class StateMismatch(ValueError):
    """A saved loader state that goes on with other batches; the message says what differs."""


@dataclass(frozen=True, eq=False)
class LoaderSpec:
    """What a loader reads: which samples, in which order, and as which views."""

    samples: Samples
    kinds: tuple[ViewKind, ...]
    """The kinds of x1, x2, ...; empty: x1 alone, the view for evaluation, in which nothing is random."""
    options: ViewOptions
    seed: int
    batches: Callable[[int], list[NDArray[np.int64]]]
    """Epoch -> this rank's indices into the samples, step by step; every epoch has as many steps."""
    batch_size: int
    """Images of all ranks together."""
    world_size: int
    drop_last: bool = False
    on_bad: Callable[[BadImage], None] = raise_it
    """What is called with the error of an unreadable image; where it returns, the batch goes on without that image."""


class Loader(Protocol):
    """A source of this rank's batches, epoch after epoch."""

    steps_per_epoch: int
    fingerprint: dict[str, str]
    """What the batches depend on, by names for people."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Gives the batches of an epoch from step `start` on, whatever was asked for before.

        They are always `steps_per_epoch - start`, as all processes take part in every step: where every image of a step
        is left out as bad, its batch has no images, views [0, 3, S, S] and labels and indices [0].
        """
        ...


def training_spec(
    samples: Samples,
    kinds: tuple[ViewKind, ...],
    options: ViewOptions,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    on_bad: Callable[[BadImage], None] = raise_it,
) -> LoaderSpec:
    """Returns the spec of batches shuffled anew in each epoch; its `batches` raises as `training_batches`."""
    share = {"rank": rank, "world_size": world_size}
    batches = partial(training_batches, len(samples), seed=seed, batch_size=batch_size, drop_last=drop_last, **share)
    return LoaderSpec(
        samples, kinds, options, seed, lambda epoch: batches(epoch=epoch), batch_size, world_size, drop_last, on_bad
    )


def balanced_spec(
    samples: Samples,
    kinds: tuple[ViewKind, ...],
    options: ViewOptions,
    *,
    seed: int,
    batch_size: int,
    on_bad: Callable[[BadImage], None] = raise_it,
) -> LoaderSpec:
    """Returns the spec, for one process, of batches that have each class equally often in an epoch."""
    batches = partial(class_balanced_batches, samples.labels, seed=seed, batch_size=batch_size)
    return LoaderSpec(
        samples, kinds, options, seed, lambda epoch: batches(epoch=epoch), batch_size, 1, drop_last=True, on_bad=on_bad
    )


def evaluation_spec(
    samples: Samples,
    options: ViewOptions,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    on_bad: Callable[[BadImage], None] = raise_it,
) -> LoaderSpec:
    """Returns the spec of batches that have each sample once over all ranks, in the same order in every epoch."""
    mine = evaluation_batches(len(samples), batch_size=batch_size, rank=rank, world_size=world_size)
    return LoaderSpec(samples, (), options, 0, lambda epoch: mine, batch_size, world_size, on_bad=on_bad)


def fingerprint(spec: LoaderSpec, pipeline: str) -> dict[str, str]:
    """Returns a loader's fingerprint; `pipeline` names what makes its pixels."""
    return {
        "loader": pipeline,
        "images and labels": f"{len(spec.samples):,}, sha256 {_digest(spec.samples)}",
        "views": f"{', '.join(spec.kinds)} of {spec.options}",
        "seed": str(spec.seed),
        "batch size": str(spec.batch_size),
        "processes": str(spec.world_size),
        "last partial batch": "dropped" if spec.drop_last else "kept",
    }


def loader_state(loader: Loader, epoch: int, step: int) -> dict[str, Any]:
    """Returns the loader state before a step of an epoch, as plain values for a checkpoint."""
    return {"epoch": epoch, "step": step, "identity": loader.fingerprint}  # the fingerprint's name in checkpoints


def read_loader_state(loader: Loader, saved: dict[str, Any]) -> tuple[int, int]:
    """Returns (epoch, step) of a loader state; raises StateMismatch where this loader would give other batches."""
    before = saved["identity"]
    differing = [
        f"{name} (was {before.get(name)}, now {value})"
        for name, value in loader.fingerprint.items()
        if before.get(name) != value
    ]
    if differing:
        raise StateMismatch(f"the saved position is one in other batches: {'; '.join(differing)}")
    return saved["epoch"], saved["step"]


def _digest(samples: Samples) -> str:
    """Returns a hash of the labels, and of the pixels or the file names.

    A name is the path below the files' common folder, as that folder may have moved.
    """
    digest = hashlib.sha256(np.ascontiguousarray(samples.labels).tobytes())
    if isinstance(samples.images, np.ndarray):
        digest.update(np.ascontiguousarray(samples.images).data)
    elif len(samples):
        folder = os.path.commonpath([os.path.dirname(path) for path in samples.images])
        digest.update("\0".join(path[len(folder) :] for path in samples.images).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]
