"""Which samples make up each batch: a pure function of seed, epoch and rank, the same for every loader."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def training_batches(
    n: int, *, epoch: int, seed: int, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
) -> list[NDArray[np.int64]]:
    """Returns this rank's indices into `n` samples, step by step: its equal slice of each shuffled batch.

    The rest that fills no batch is dropped or, with drop_last=False or where it is all there is, sliced near-equally.
    A rest smaller than `world_size` is always dropped: every rank takes part in every step. Raises ValueError where
    `batch_size` is not a multiple of `world_size`, or `n` is below `world_size`.
    """
    _local_batch(batch_size, world_size)
    if n < world_size:
        raise ValueError(f"{n} training samples cannot be shared by {world_size} processes")
    order = np.random.default_rng((seed, epoch)).permutation(n)
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    rest = n % batch_size
    if rest and len(batches) > 1 and (drop_last or rest < world_size):
        batches.pop()
    return [np.array_split(batch, world_size)[rank] for batch in batches]


def class_balanced_batches(
    labels: NDArray[np.int64], *, epoch: int, seed: int, batch_size: int
) -> list[NDArray[np.int64]]:
    """Returns indices into samples of `labels` [n], step by step, so that an epoch has each class equally often.

    That is class-balanced sampling (Kang et al., ICLR 2020, section 3) without its randomness: over n indices, the
    counts of the classes that have samples differ by one at most, and so do those of the samples of a class. A rest
    that fills no batch is dropped, unless it is all there is.
    """
    rng = np.random.default_rng((seed, epoch))
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    members = np.split(order, starts[1:])
    share, rest = divmod(len(labels), len(members))
    times = np.full(len(members), share)
    times[rng.choice(len(members), rest, replace=False)] += 1
    picked = [np.resize(rng.permutation(own), wanted) for own, wanted in zip(members, times, strict=True)]
    shuffled = rng.permutation(np.concatenate(picked))
    whole = max(len(shuffled) // batch_size, 1) * batch_size
    return [shuffled[start : start + batch_size] for start in range(0, min(whole, len(shuffled)), batch_size)]


def evaluation_batches(n: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> list[NDArray[np.int64]]:
    """Returns this rank's indices, step by step: each of `n` samples once over all ranks, in order.

    A global step has at most `batch_size` samples. All ranks have the same number of steps, where each has a sample
    and its batches may hold two or more.
    """
    local = _local_batch(batch_size, world_size)
    steps = -(-n // (world_size * local))
    mine = np.array_split(np.arange(n), world_size)[rank]
    return [batch for batch in np.array_split(mine, max(steps, 1)) if len(batch)]


def _local_batch(batch_size: int, world_size: int) -> int:
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} (of all processes together) is not a multiple of {world_size}")
    return batch_size // world_size
