"""Makes the weights that losses give to each class, of its training images or its accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rcl_fast import checks


def log_prior(class_counts: Tensor | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns log π_j = log(n_j / Σ n), [C] in `dtype`, of the training images a class (all above 0).

    Raises:
        TypeError, ValueError: class_counts are not [C] such numbers; values on a GPU are not read.
    """
    counts = checks.as_class_vector("class_counts", class_counts)
    checks.check_class_counts(counts, rebalance=True)
    return counts.double().log().log_softmax(dim=0).to(dtype)  # Σ n and n_j / Σ n could leave float64's range


def effective_number_weights(
    class_counts: Tensor | Sequence[int], beta: float = 0.9999, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns (1 − β) / (1 − β^n_j), scaled to a mean of 1, [C] in `dtype` (Cui et al., CVPR 2019, eq. 2-4).

    Args:
        class_counts: [C] training images a class (n_j), 1 or more: shares of a data set have no effective number.
        beta: in [0, 1).

    Raises:
        TypeError, ValueError: class_counts or beta are no such numbers; values on a GPU are not read.
    """
    checks.check_beta(beta)
    counts = checks.as_class_vector("class_counts", class_counts)
    checks.check_sample_counts(counts)
    weights = -1 / torch.special.xlogy(counts.double(), beta).expm1()  # 1 − β^n, without the digits that cancel in it
    return (weights / weights.mean()).to(dtype)


def compression_factors(
    class_accuracy: Tensor | Sequence[float], *, under: float = 1.0, rest: float = 0.005, threshold: float = 0.2
) -> Tensor:
    """Returns the factor of each class on its unit features, float32 [C] (paper, section 3.3.2).

    Args:
        class_accuracy: [C] fractions in [0, 1], on the validation set; NaN for a class without images there, which
            keeps 1.
        under: the factor of classes whose accuracy is below `threshold`; `rest`: that of all others. The defaults
            are the numbers of section 4.3, which made the paper's tables; the text of section 3.3.2 reads
            under=0.005, rest=1.
        threshold: a fraction in [0, 1].

    Raises:
        TypeError, ValueError: class_accuracy is not [C] fractions, threshold none, or a factor negative or not finite.
    """
    for name, factor in {"under": under, "rest": rest}.items():
        checks.check_not_negative(name, factor)
    checks.check_number("threshold", threshold, lambda number: 0 <= number <= 1, "be a fraction in [0, 1]")
    accuracy = checks.as_class_vector("class_accuracy", class_accuracy)
    checks.check_class_accuracy(accuracy)
    factors = torch.full_like(accuracy, rest, dtype=torch.float32)
    return factors.masked_fill(accuracy < threshold, under).masked_fill(accuracy.isnan(), 1)
