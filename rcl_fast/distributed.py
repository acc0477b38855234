"""The loss of all processes' anchors together; each process computes the part of its local anchors.

Every process gathers features and labels, then losses and what a gradient needs of their softmax (two or three numbers
an anchor). With these it has the whole gradient of its local features, their terms in other processes' losses included:
no gradient travels, and the backward pass of a scalar waits for nobody. The equations are in backends/README.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from rcl_fast.agreement import HEADER_BYTES, agreed_sizes
from rcl_fast.autograd import first_derivative_only
from rcl_fast.backends import select
from rcl_fast.backends.protocol import Backend
from rcl_fast.batch import ContrastiveBatch, with_class_indices

LABEL_BYTES = 8
ALIGNMENT = 16  # bytes; of each block in a buffer, so that its numbers can be viewed where they lie


def bytes_sent(anchors: int, dimensions: int, dtype: torch.dtype = torch.float32, softmax_numbers: int = 1) -> int:
    """Returns the bytes that one process gives to its collectives in one step, forward and backward, of any reduction.

    anchors: of the process that has most of them, as others are padded to it. A ring carries W − 1 times as much
    through each process of W. softmax_numbers: what the backend's gradient needs of an anchor's softmax, 1 with
    "triton", 2 with "tiled", none with the others. Prototypes and keys are everyone's already and stay where they are.
    """
    loss_bytes = 8 if dtype == torch.float64 else 4
    rows = _aligned(anchors * dimensions * dtype.itemsize) + _aligned(anchors * LABEL_BYTES)
    return HEADER_BYTES + rows + _aligned(anchors * softmax_numbers * loss_bytes) + _aligned(anchors * loss_bytes)


@torch.compiler.disable  # sizes of other processes are known at run time only
def contrastive_loss(batch: ContrastiveBatch, reduction: str, backend: str, group: ProcessGroup) -> Tensor:
    """Returns the loss of the anchors of all processes in `group`: the same scalar in each; for "none" the local [n].

    With W processes the gradients are W times the true ones: of the local features, as their part in everyone's loss;
    of prototypes and keys, which every process holds alike, by the local anchors' losses. DistributedDataParallel
    divides their sum by W, which gives the gradients of one process with the whole batch.

    Every process of the group must call it as often as the others, and scale the scalar alike before backward; for
    "none" it must run backward as often, too. Local batches may be uneven or empty. `batch` is this process's.
    "reference" and "dense" compute everyone's losses in every process.

    Raises:
        RuntimeError: in every process, where they do not agree on options, dtypes, widths, class counts, compression,
            prototypes, keys or their labels.
    """
    sizes = agreed_sizes(batch, reduction, backend, group)
    features, labels = _all_gather([batch.features.detach(), batch.labels], sizes, group)
    everyone = with_class_indices(batch._replace(features=features, labels=labels))
    call = _Call(everyone, sizes, select.get(backend), group)
    if reduction == "none":
        return _LocalLosses.apply(batch.features, batch.prototypes, batch.keys, call)
    return _Total.apply(batch.features, batch.prototypes, batch.keys, reduction, call)


class _Call(NamedTuple):
    """What both passes of a loss need to know."""

    everyone: ContrastiveBatch  # all anchors, this process's first, and what is everyone's
    sizes: list[int]  # anchors of each process
    backend: Backend
    group: ProcessGroup

    def constants(self) -> tuple[Tensor | None, ...]:
        """Returns what else the backward pass reads again: saved for it, it is known to be unchanged there."""
        return self.everyone.class_counts, self.everyone.compression, self.everyone.key_labels

    def gradients(
        self, leaves: tuple[Tensor | None, ...], saved: tuple[Any, ...], softmax: Tensor, grad_losses: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Returns W times the gradients of `leaves`: local features, prototypes and keys.

        softmax and grad_losses are everyone's.
        """
        local = self.sizes[distributed.get_rank(self.group)]
        gradients = self.backend.backward_rows(self.everyone, local, saved, softmax, grad_losses)
        return tuple(
            None if leaf is None or gradient is None else (gradient * len(self.sizes)).to(leaf.dtype)
            for leaf, gradient in zip(leaves, gradients, strict=True)
        )


class _LocalLosses(torch.autograd.Function):
    """Computes ℓ_i of the local anchors; what each counts for is known in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor | None, keys: Tensor | None, call: _Call) -> Tensor:
        losses, softmax, _, saved = call.backend.forward_rows(call.everyone, len(features))
        ctx.save_for_backward(features, prototypes, keys, softmax, *call.constants(), *saved)
        ctx.call = call
        return losses

    @staticmethod
    @first_derivative_only("the loss with group=")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, keys, softmax, _, _, _, *saved = ctx.saved_tensors
        call: _Call = ctx.call
        softmax, grad_losses = _all_gather([softmax, grad_output.to(softmax.dtype)], call.sizes, call.group)
        return *call.gradients((features, prototypes, keys), tuple(saved), softmax, grad_losses), None


class _Total(torch.autograd.Function):
    """Computes the sum or mean of everyone's ℓ_i; grad_output is the same everywhere, so backward needs nobody."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor | None, keys: Tensor | None, reduction: str, call: _Call
    ) -> Tensor:
        losses, softmax, positives, saved = call.backend.forward_rows(call.everyone, len(features))
        softmax, losses = _all_gather([softmax, losses], call.sizes, call.group)
        with_positive = (positives > 0).sum().double()
        weight = 1 / with_positive.clamp(min=1) if reduction == "mean" else torch.ones_like(with_positive)
        ctx.save_for_backward(features, prototypes, keys, weight, softmax, *call.constants(), *saved)
        ctx.call = call
        total = _in_order(losses, call).sum(dtype=torch.float64) * weight
        return total.to(losses.dtype)

    @staticmethod
    @first_derivative_only("the loss with group=")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, keys, weight, softmax, _, _, _, *saved = ctx.saved_tensors
        grad_losses = (grad_output * weight).to(softmax.dtype).expand(len(softmax))
        return *ctx.call.gradients((features, prototypes, keys), tuple(saved), softmax, grad_losses), None, None


def _in_order(rows: Tensor, call: _Call) -> Tensor:
    """Returns rows of all anchors in the order of the processes, so that their sum has the same bits in each."""
    rank = distributed.get_rank(call.group)
    local, before = call.sizes[rank], sum(call.sizes[:rank])
    return torch.cat([rows[local : local + before], rows[:local], rows[local + before :]])


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
        gathered.append(torch.cat(list(rows)).view(sum(sizes), *part.shape[1:]))
    return gathered


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
