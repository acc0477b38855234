"""What a backend is: a module with these four functions. `select.get` has them by name."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from rcl_fast.batch import ContrastiveBatch


class Backend(Protocol):
    """A way to compute the loss of a batch whose labels are class indices (`batch.with_class_indices`)."""

    def losses(self, batch: ContrastiveBatch) -> Tensor:
        """Returns ℓ_i for each anchor [N], differentiable; 0 for an anchor without a positive."""

    def total(self, batch: ContrastiveBatch, reduction: str) -> Tensor:
        """Returns the "sum" of ℓ_i, or their "mean" over the anchors that have a positive; differentiable scalar."""

    def forward_rows(self, batch: ContrastiveBatch, rows: int) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """Returns ℓ_i and lse_i of the first `rows` anchors [rows], and the tensors that `backward_rows` reads.

        All anchors are keys. lse_i is +inf for an anchor without a positive. Only `backward_rows` reads the other
        lse_i; each backend chooses their base.
        """

    def backward_rows(
        self, batch: ContrastiveBatch, rows: int, saved: tuple[Any, ...], lse: Tensor, grad_losses: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradient of Σ_k g_k ℓ_k by the first `rows` features, and of its terms k < rows by prototypes.

        lse and grad_losses g are of all anchors, [N] each.
        """
