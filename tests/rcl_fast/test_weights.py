"""Log-priors, effective numbers, compression factors."""

import pytest
import torch

from rcl_fast.weights import compression_factors, effective_number_weights, log_prior


def test_log_prior() -> None:
    assert log_prior(torch.tensor([3, 1])).exp().tolist() == pytest.approx([0.75, 0.25])


def test_effective_numbers_by_hand() -> None:
    # beta 0.5: effective numbers 1 (n = 1), 1.5 (n = 2); their inverses 1 and 2/3, scaled to a mean of 1
    assert effective_number_weights(torch.tensor([1, 2]), 0.5).tolist() == pytest.approx([1.2, 0.8])
    assert effective_number_weights(torch.tensor([1, 9]), 0.0).tolist() == [1, 1]
    with pytest.raises(ValueError, match="beta"):
        effective_number_weights(torch.tensor([1, 2]), 1.0)


def test_the_two_readings_of_compression() -> None:
    accuracy = torch.tensor([0.0, 0.19, 0.2, 0.9, float("nan")])
    assert compression_factors(accuracy).tolist() == pytest.approx([1, 1, 0.005, 0.005, 1])
    other = compression_factors(accuracy, under=0.005, rest=1.0)
    assert other.tolist() == pytest.approx([0.005, 0.005, 1, 1, 1])
