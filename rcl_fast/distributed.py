"""The loss of all processes' anchors together, each process computing its own anchors' part.

Every process gathers features and labels, then lse and losses (two numbers an anchor). The gradient of its own
features it then has whole, their terms in other processes' losses included: no gradient travels, and the backward
pass waits for nobody. The equations are in backends/README.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from rcl_fast.backends import dense, reference, tiled
from rcl_fast.batch import ContrastiveBatch, positives_per_anchor, with_class_indices, without_autocast

HEADER_BYTES, LABEL_BYTES = 16, 8
ALIGNMENT = 16  # bytes; of each block in a buffer, so that its numbers can be viewed where they lie


def bytes_sent(anchors: int, dimensions: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that one process gives to its collectives in one step, forward and backward, of any reduction.

    anchors: of the process that has most of them, as others are padded to it. A ring carries W − 1 times as much
    through each process of W. Prototypes are everyone's already and stay where they are.
    """
    loss_bytes = 8 if dtype == torch.float64 else 4
    rows = _aligned(anchors * dimensions * dtype.itemsize) + _aligned(anchors * LABEL_BYTES)
    return HEADER_BYTES + rows + 2 * _aligned(anchors * loss_bytes)


@torch.compiler.disable  # sizes of other processes are known at run time only
def contrastive_loss(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> Tensor:
    """The loss of the anchors of all processes in `group`: a scalar, the same in each; for "none" [N] of its own.

    With W processes the gradients are W times the true ones: of its own features, as their part in everyone's loss; of
    the prototypes, which every process holds alike, by its own anchors' losses. DistributedDataParallel divides their
    sum by W, which gives the gradients of one process with the whole batch.

    Every process of the group must call it as often as the others, and scale the scalar alike before backward; for
    "none" it must run backward as often, too. Local batches may be uneven or empty. `batch` is this process's.
    "reference" and "dense" compute everyone's losses in every process.

    Raises:
        RuntimeError: in every process, where they do not agree on options, dtypes or widths.
    """
    sizes = _agreed_sizes(batch, reduction, backend, group)
    features, labels = _gathered([batch.features.detach(), batch.labels], sizes, group)
    everyone = with_class_indices(batch._replace(features=features, labels=labels))
    call = _Call(everyone, sizes, _rows_of(backend), group)
    if reduction == "none":
        return _OwnLosses.apply(batch.features, batch.prototypes, call)
    counted = (positives_per_anchor(everyone) > 0).sum().double()
    weight = 1 / counted.clamp(min=1) if reduction == "mean" else torch.ones_like(counted)
    return _WeightedTotal.apply(batch.features, batch.prototypes, weight, call)


class _Rows(NamedTuple):
    """How a backend computes the losses of the first rows of a batch, and their gradients: see backends/tiled.py."""

    forward: Callable[[ContrastiveBatch, int], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
    backward: Callable[[ContrastiveBatch, int, tuple[Tensor, ...], Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _rows_of(backend: str) -> _Rows:
    if backend == "tiled":
        return _Rows(tiled.forward_rows, tiled.backward_rows)
    if backend == "triton":
        from rcl_fast.backends import triton  # needs Triton, which not every platform has

        return _Rows(triton.forward_rows, triton.backward_rows)
    return _rows_of_all_losses({"dense": dense, "reference": reference}[backend])


def _rows_of_all_losses(module: ModuleType) -> _Rows:
    """By autograd through the losses of all anchors: obvious, and as much work in each process as in one alone."""

    def forward(batch: ContrastiveBatch, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        losses = module.contrastive_loss(batch)[:rows]
        return losses, torch.zeros_like(losses), ()  # autograd needs no lse

    def backward(
        batch: ContrastiveBatch, rows: int, saved: tuple[Tensor, ...], lse: Tensor, upstream: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            batch = batch._replace(features=batch.features.detach().requires_grad_())
            if batch.prototypes is not None:
                batch = batch._replace(prototypes=batch.prototypes.detach().requires_grad_())
            losses = module.contrastive_loss(batch)
        (for_features,) = torch.autograd.grad(losses, batch.features, upstream, retain_graph=True)
        if batch.prototypes is None:
            return for_features[:rows], None
        own_upstream = torch.where(torch.arange(len(upstream), device=upstream.device) < rows, upstream, 0.0)
        (for_prototypes,) = torch.autograd.grad(losses, batch.prototypes, own_upstream)
        return for_features[:rows], for_prototypes

    return _Rows(forward, backward)


class _Call(NamedTuple):
    """What both passes of a loss need to know."""

    everyone: ContrastiveBatch  # all anchors, this process's first, and what is everyone's
    sizes: list[int]  # anchors of each process
    rows_of: _Rows
    group: ProcessGroup

    def gradients(
        self, own: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], lse: Tensor, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """W times those of the own features and prototypes; lse and upstream are of all anchors."""
        this = self.sizes[distributed.get_rank(self.group)]
        gradients = self.rows_of.backward(self.everyone, this, saved, lse, upstream)
        return tuple(
            None if leaf is None or gradient is None else (gradient * len(self.sizes)).to(leaf.dtype)
            for leaf, gradient in zip(own, gradients, strict=True)
        )


class _OwnLosses(torch.autograd.Function):
    """ℓ_i of this process's anchors, whose upstream weights are known in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor | None, call: _Call) -> Tensor:
        losses, lse, saved = call.rows_of.forward(call.everyone, len(features))
        ctx.save_for_backward(features, prototypes, lse, *saved)
        ctx.call = call
        return losses

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, lse, *saved = ctx.saved_tensors
        call: _Call = ctx.call
        lse, upstream = _gathered([lse, upstream.to(lse.dtype)], call.sizes, call.group)
        return *call.gradients((features, prototypes), tuple(saved), lse, upstream), None


class _WeightedTotal(torch.autograd.Function):
    """weight · Σ_i ℓ_i of everyone's anchors; being scaled alike everywhere, its backward pass needs nobody."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor | None, weight: Tensor, call: _Call) -> Tensor:
        losses, lse, saved = call.rows_of.forward(call.everyone, len(features))
        lse, losses = _gathered([lse, losses], call.sizes, call.group)
        ctx.save_for_backward(features, prototypes, weight, lse, *saved)
        ctx.call = call
        total = _in_order(losses, call).sum(dtype=torch.float64) * weight
        return total.to(losses.dtype)

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, weight, lse, *saved = ctx.saved_tensors
        upstreams = (upstream * weight).to(lse.dtype).expand(len(lse))
        return *ctx.call.gradients((features, prototypes), tuple(saved), lse, upstreams), None, None


def _in_order(rows: Tensor, call: _Call) -> Tensor:
    """Rows of all anchors by process, so that their sum has the same bits in each."""
    this = distributed.get_rank(call.group)
    own, before = call.sizes[this], sum(call.sizes[:this])
    return torch.cat([rows[own : own + before], rows[:own], rows[own + before :]])


def _agreed_sizes(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> list[int]:
    """Anchors of each process; raises RuntimeError where the processes' calls differ in anything else."""
    facts = _facts(batch, reduction, backend)
    header = torch.tensor([len(batch.features), _digest(facts)], device=batch.features.device)
    headers = header.new_empty(distributed.get_world_size(group) * len(header))
    distributed.all_gather_into_tensor(headers, header, group=group)
    sizes, digests = headers.view(-1, len(header)).T.tolist()
    if len(set(digests)) > 1:
        raise RuntimeError(_difference(facts, group))
    return sizes


def _facts(batch: ContrastiveBatch, reduction: str, backend: str) -> dict[str, str]:
    """What must be the same in every process, by the name that a person knows it by."""
    facts = {
        "the width of the features": batch.features.shape[1],
        "the dtype of the features": batch.features.dtype,
        "prototypes": None if batch.prototypes is None else (*batch.prototypes.shape, batch.prototypes.dtype),
        "the number of classes": batch.num_classes or "unknown",
        "rebalance": batch.class_counts is not None,
        "compression": "none" if batch.compression is None else "given",
        "temperature": batch.temperature,
        "class_average": batch.class_average,
        "normalize": batch.normalize,
        "reduction": reduction,
        "the backend (auto: by device and dtype)": backend,
    }
    return {name: str(value) for name, value in facts.items()}


def _digest(facts: dict[str, str]) -> int:
    """A number that tells facts apart, the same in every process, which Python's own hash is not."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "little")


def _difference(facts: dict[str, str], group: ProcessGroup) -> str:
    everyones: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyones, facts, group=group)
    for process, others in enumerate(everyones):
        for name, value in others.items():
            if value != everyones[0][name]:
                return (
                    f"the processes of group must call the loss alike, and they differ in {name}: process 0 has "
                    f"{everyones[0][name]}, process {process} has {value}"
                )
    raise AssertionError("unreachable: their digests differ")


def _gathered(parts: list[Tensor], sizes: list[int], group: ProcessGroup) -> list[Tensor]:
    """Each tensor [n, ...] of all processes as one [N, ...], this process's rows first. One collective of bytes.

    Local sizes being uneven, all are padded to the largest.
    """
    largest, processes, this = max(sizes), len(sizes), distributed.get_rank(group)
    if largest == 0:
        return parts
    widths = [part.element_size() * math.prod(part.shape[1:]) for part in parts]  # bytes of a row
    blocks = [_aligned(largest * width) for width in widths]
    mine = torch.empty(sum(blocks), dtype=torch.uint8, device=parts[0].device)
    for part, width, block in zip(parts, widths, mine.split(blocks), strict=True):
        block[: len(part) * width].view(part.dtype).copy_(part.reshape(-1))
    everyones = mine.new_empty(processes, len(mine))
    distributed.all_gather_into_tensor(everyones.view(-1), mine, group=group)
    own_first = [this, *(process for process in range(processes) if process != this)]
    gathered = []
    for part, width, block in zip(parts, widths, everyones.split(blocks, dim=1), strict=True):
        rows = (block[process, : sizes[process] * width].view(part.dtype) for process in own_first)
        gathered.append(torch.cat(list(rows)).view(-1, *part.shape[1:]))
    return gathered


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
