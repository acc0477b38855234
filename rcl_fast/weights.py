"""Makes the weights that losses give to each class, of its training images or its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from rcl_fast import checks


def log_prior(class_counts: Tensor) -> Tensor:
    """Returns log π_j = log(n_j / Σ n), float32 [C], of the training images a class (all above 0)."""
    checks.check_class_counts(class_counts, rebalance=True)
    counts = class_counts.double()
    return (counts / counts.sum()).log().float()


def effective_number_weights(class_counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Returns (1 − β) / (1 − β^n_j), scaled to a mean of 1, float32 [C] (Cui et al., CVPR 2019, eq. 2-4)."""
    checks.check_class_counts(class_counts, rebalance=True)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    weights = (1 - beta) / (1 - beta ** class_counts.double())
    return (weights / weights.mean()).float()


def compression_factors(
    class_accuracy: Tensor, *, under: float = 1.0, rest: float = 0.005, threshold: float = 0.2
) -> Tensor:
    """Returns the factor of each class on its unit features, float32 [C] (paper, section 3.3.2).

    Args:
        class_accuracy: [C] fractions in [0, 1], on the validation set; NaN for a class without images there, which
            keeps 1.
        under: the factor of classes whose accuracy is below `threshold`; `rest`: that of all others. The defaults
            are the numbers of section 4.3, which made the paper's tables; the text of section 3.3.2 reads
            under=0.005, rest=1.
    """
    factors = torch.where(class_accuracy < threshold, float(under), float(rest)).float()
    return factors.masked_fill(class_accuracy.isnan(), 1.0)
