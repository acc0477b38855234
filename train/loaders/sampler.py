"""Which samples make up each batch: a pure function of seed, epoch and rank, the same for every loader."""

import numpy as np
from numpy.typing import NDArray


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


def class_balanced_batches(
    labels: NDArray[np.int64], *, epoch: int, seed: int, batch_size: int
) -> list[NDArray[np.int64]]:
    """Indices into samples of `labels` [n], step by step, so that an epoch of n has each class equally often.

    That is class-balanced sampling (Kang et al., ICLR 2020, section 3) without its chance: the classes that have
    samples differ by one at most over the n, and so do the samples of a class. A rest that fills no batch is dropped,
    unless it is all there is.
    """
    rng = np.random.default_rng((seed, epoch))
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    members = np.split(order, starts[1:])
    share, rest = divmod(len(labels), len(members))
    times = np.full(len(members), share)
    times[rng.choice(len(members), rest, replace=False)] += 1
    drawn = [np.resize(rng.permutation(own), wanted) for own, wanted in zip(members, times, strict=True)]
    shuffled = rng.permutation(np.concatenate(drawn))
    whole = max(len(shuffled) // batch_size, 1) * batch_size
    return [shuffled[start : start + batch_size] for start in range(0, min(whole, len(shuffled)), batch_size)]


def evaluation_batches(n: int, *, batch_size: int, rank: int = 0, world: int = 1) -> list[NDArray[np.int64]]:
    """This rank's indices, in order: each of `n` samples once over all ranks, at most `batch_size` in a global step.

    Every rank takes the same number of steps, so long as none has less than one sample or a batch below two.
    """
    local = _local_batch(batch_size, world)
    steps = -(-n // (world * local))
    mine = np.array_split(np.arange(n), world)[rank]
    return [batch for batch in np.array_split(mine, max(steps, 1)) if len(batch)]


def _local_batch(batch_size: int, world: int) -> int:
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size {batch_size} (of all processes together) is not a multiple of {world}")
    return batch_size // world
