"""The loss of all processes' anchors together; each process computes the part of its local anchors.

Every process gathers features and labels, then lse and losses (two numbers an anchor). With these it has the whole
gradient of its local features, their terms in other processes' losses included: no gradient travels, and the backward
pass of a scalar waits for nobody. The equations are in backends/README.md.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from rcl_fast.backends import select
from rcl_fast.backends.protocol import Backend
from rcl_fast.batch import ContrastiveBatch, with_class_indices, without_autocast

HEADER_BYTES, LABEL_BYTES = 16, 8
ALIGNMENT = 16  # bytes; of each block in a buffer, so that its numbers can be viewed where they lie


def bytes_sent(anchors: int, dimensions: int, dtype: torch.dtype = torch.float32) -> int:
    """Returns the bytes that one process gives to its collectives in one step, forward and backward, of any reduction.

    anchors: of the process that has most of them, as others are padded to it. A ring carries W − 1 times as much
    through each process of W. Prototypes are everyone's already and stay where they are.
    """
    loss_bytes = 8 if dtype == torch.float64 else 4
    rows = _aligned(anchors * dimensions * dtype.itemsize) + _aligned(anchors * LABEL_BYTES)
    return HEADER_BYTES + rows + 2 * _aligned(anchors * loss_bytes)


@torch.compiler.disable  # sizes of other processes are known at run time only
def contrastive_loss(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> Tensor:
    """Returns the loss of the anchors of all processes in `group`: the same scalar in each; for "none" the local [n].

    With W processes the gradients are W times the true ones: of the local features, as their part in everyone's loss;
    of the prototypes, which every process holds alike, by the local anchors' losses. DistributedDataParallel divides
    their sum by W, which gives the gradients of one process with the whole batch.

    Every process of the group must call it as often as the others, and scale the scalar alike before backward; for
    "none" it must run backward as often, too. Local batches may be uneven or empty. `batch` is this process's.
    "reference" and "dense" compute everyone's losses in every process.

    Raises:
        RuntimeError: in every process, where they do not agree on options, dtypes or widths.
    """
    sizes = _all_gather_sizes(batch, reduction, backend, group)
    features, labels = _all_gather([batch.features.detach(), batch.labels], sizes, group)
    everyone = with_class_indices(batch._replace(features=features, labels=labels))
    call = _Call(everyone, sizes, select.get(backend), group)
    if reduction == "none":
        return _LocalLosses.apply(batch.features, batch.prototypes, call)
    return _Total.apply(batch.features, batch.prototypes, reduction, call)


class _Call(NamedTuple):
    """What both passes of a loss need to know."""

    everyone: ContrastiveBatch  # all anchors, this process's first, and what is everyone's
    sizes: list[int]  # anchors of each process
    backend: Backend
    group: ProcessGroup

    def gradients(
        self, leaves: tuple[Tensor | None, ...], saved: tuple[Any, ...], lse: Tensor, grad_losses: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Returns W times the gradients of local features and prototypes; lse and grad_losses are of all anchors."""
        local = self.sizes[distributed.get_rank(self.group)]
        gradients = self.backend.backward_rows(self.everyone, local, saved, lse, grad_losses)
        return tuple(
            None if leaf is None or gradient is None else (gradient * len(self.sizes)).to(leaf.dtype)
            for leaf, gradient in zip(leaves, gradients, strict=True)
        )


class _LocalLosses(torch.autograd.Function):
    """Computes ℓ_i of the local anchors; what each counts for is known in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor | None, call: _Call) -> Tensor:
        losses, lse, saved = call.backend.forward_rows(call.everyone, len(features))
        ctx.save_for_backward(features, prototypes, lse, *saved)
        ctx.call = call
        return losses

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, lse, *saved = ctx.saved_tensors
        call: _Call = ctx.call
        lse, grad_losses = _all_gather([lse, grad_output.to(lse.dtype)], call.sizes, call.group)
        return *call.gradients((features, prototypes), tuple(saved), lse, grad_losses), None


class _Total(torch.autograd.Function):
    """Computes the sum or mean of everyone's ℓ_i; grad_output is the same everywhere, so backward needs nobody."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor | None, reduction: str, call: _Call) -> Tensor:
        losses, lse, saved = call.backend.forward_rows(call.everyone, len(features))
        lse, losses = _all_gather([lse, losses], call.sizes, call.group)
        with_positive = (lse != torch.inf).sum().double()
        weight = 1 / with_positive.clamp(min=1) if reduction == "mean" else torch.ones_like(with_positive)
        ctx.save_for_backward(features, prototypes, weight, lse, *saved)
        ctx.call = call
        total = _in_order(losses, call).sum(dtype=torch.float64) * weight
        return total.to(losses.dtype)

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, weight, lse, *saved = ctx.saved_tensors
        grad_losses = (grad_output * weight).to(lse.dtype).expand(len(lse))
        return *ctx.call.gradients((features, prototypes), tuple(saved), lse, grad_losses), None, None


def _in_order(rows: Tensor, call: _Call) -> Tensor:
    """Returns rows of all anchors in the order of the processes, so that their sum has the same bits in each."""
    rank = distributed.get_rank(call.group)
    local, before = call.sizes[rank], sum(call.sizes[:rank])
    return torch.cat([rows[local : local + before], rows[:local], rows[local + before :]])


def _all_gather_sizes(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> list[int]:
    """Returns the anchors of each process; raises RuntimeError where the processes' calls differ in anything else."""
    facts = _facts(batch, reduction, backend)
    header = torch.tensor([len(batch.features), _digest(facts)], device=batch.features.device)
    headers = header.new_empty(distributed.get_world_size(group) * len(header))
    distributed.all_gather_into_tensor(headers, header, group=group)
    sizes, digests = headers.view(-1, len(header)).T.tolist()
    if len(set(digests)) > 1:
        raise RuntimeError(_all_gather_difference(facts, group))
    return sizes


def _facts(batch: ContrastiveBatch, reduction: str, backend: str) -> dict[str, str]:
    """Returns what must be the same in every process, by the name that a person knows it by."""
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
    """Returns a number that tells facts apart, the same in every process, which Python's hash is not."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "little")


def _all_gather_difference(facts: dict[str, str], group: ProcessGroup) -> str:
    """Returns what differs first between the processes, as a sentence."""
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, facts, group=group)
    for process, others in enumerate(gathered):
        for name, value in others.items():
            if value != gathered[0][name]:
                return (
                    f"the processes of group must call the loss alike, and they differ in {name}: process 0 has "
                    f"{gathered[0][name]}, process {process} has {value}"
                )
    raise AssertionError("unreachable: their digests differ")


def _all_gather(parts: list[Tensor], sizes: list[int], group: ProcessGroup) -> list[Tensor]:
    """Returns each tensor [n, ...] of all processes as one [N, ...], the local rows first. One collective of bytes.

    Local sizes may be uneven: all are padded to the largest.
    """
    largest, processes, rank = max(sizes), len(sizes), distributed.get_rank(group)
    if largest == 0:
        return parts
    widths = [part.element_size() * math.prod(part.shape[1:]) for part in parts]  # bytes of a row
    blocks = [_aligned(largest * width) for width in widths]
    buffer = torch.empty(sum(blocks), dtype=torch.uint8, device=parts[0].device)
    for part, width, block in zip(parts, widths, buffer.split(blocks), strict=True):
        block[: len(part) * width].view(part.dtype).copy_(part.reshape(-1))
    buffers = buffer.new_empty(processes, len(buffer))
    distributed.all_gather_into_tensor(buffers.view(-1), buffer, group=group)
    local_first = [rank, *(process for process in range(processes) if process != rank)]
    gathered = []
    for part, width, block in zip(parts, widths, buffers.split(blocks, dim=1), strict=True):
        rows = (block[process, : sizes[process] * width].view(part.dtype) for process in local_first)
        gathered.append(torch.cat(list(rows)).view(-1, *part.shape[1:]))
    return gathered


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
