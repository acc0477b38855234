"""What a backend is: a module with these four functions. `select.get` has them by name."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from rcl_fast.batch import ContrastiveBatch


class RowLosses(NamedTuple):
    """The losses of some of the anchors, and what comes with them."""

    losses: Tensor  # [rows] ℓ_i, 0 for an anchor without a positive
    softmax: Tensor  # [rows, ...] what a gradient needs of an anchor's log-sum-exp; each backend chooses what
    positives: Tensor  # [N] |P(i)| of all anchors, int or float; 0: no positive
    saved: tuple[Any, ...]  # other tensors that `backward_rows` reads; they stay in their process


class Backend(Protocol):
    """A way to compute the loss of a batch whose labels are class indices (`batch.with_class_indices`)."""

    def losses(self, batch: ContrastiveBatch) -> Tensor:
        """Returns ℓ_i for each anchor [N], differentiable; 0 for an anchor without a positive."""

    def total(self, batch: ContrastiveBatch, reduction: str) -> Tensor:
        """Returns the "sum" of ℓ_i, or their "mean" over the anchors that have a positive; differentiable scalar."""

    def forward_rows(self, batch: ContrastiveBatch, rows: int) -> RowLosses:
        """Returns ℓ_i of the first `rows` anchors, and what `backward_rows` reads. The keys are everyone's."""

    def backward_rows(
        self, batch: ContrastiveBatch, rows: int, saved: tuple[Any, ...], softmax: Tensor, grad_losses: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by the prototypes
        and by the keys, None where there are none; that of keys may be None where they do not require grad.

        softmax [N, ...] and grad_losses g [N] are of all anchors.
        """
