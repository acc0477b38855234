"""What the tests of loaders ask of batches."""

from __future__ import annotations

import torch

from rcl_fast.train.loaders.base import Batch


def tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return (*batch.views, batch.labels, batch.indices)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        len(a.views) == len(b.views) and all(map(torch.equal, tensors(a), tensors(b)))
        for a, b in zip(first, second, strict=True)
    )


def joined(*ranks: list[Batch]) -> list[Batch]:
    """Returns the batches of all ranks, one whole batch a step."""
    return [
        Batch(
            tuple(map(torch.cat, zip(*(batch.views for batch in step), strict=True))),
            torch.cat([batch.labels for batch in step]),
            torch.cat([batch.indices for batch in step]),
        )
        for step in zip(*ranks, strict=True)
    ]
