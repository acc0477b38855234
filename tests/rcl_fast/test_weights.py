"""Log-priors, effective numbers, compression factors: by hand, and for any numbers in 50 digits."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rcl_fast.weights import compression_factors, effective_number_weights, log_prior


def test_log_prior() -> None:
    assert log_prior(torch.tensor([3, 1])).exp().tolist() == pytest.approx([0.75, 0.25])


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=6))
@example([1e300, 1e300, 1e-300])
@example([1.7e308, 1.7e308])
def test_log_priors_of_any_counts(counts: list[float]) -> None:
    with localcontext() as context:
        context.prec = 50
        total = sum(map(Decimal, counts))
        expected = [float((Decimal(n) / total).ln()) for n in counts]
    ours = log_prior(torch.tensor(counts, dtype=torch.float64), torch.float64)
    # log n, the largest, log Σ: each to half a unit in the last place of numbers below 700, and a sum of six
    assert ours.tolist() == pytest.approx(expected, rel=0, abs=(3 * 700 / 2 + 6) * 2**-52)
    assert torch.equal(log_prior(counts), ours.float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int64, torch.float16, torch.bfloat16])
def test_counts_of_any_dtype(dtype: torch.dtype) -> None:
    counts = torch.tensor([120, 3, 1])
    assert torch.equal(log_prior(counts.to(dtype)), log_prior(counts))
    assert torch.equal(effective_number_weights(counts.to(dtype)), effective_number_weights(counts))


def test_counts_whose_sum_overflows_their_dtype() -> None:
    assert log_prior(torch.tensor([2**62, 2**62, 2**62])).exp().tolist() == pytest.approx([1 / 3] * 3)
    assert log_prior(torch.tensor([200, 200], dtype=torch.uint8)).exp().tolist() == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="class 1 has inf"):
        log_prior(torch.tensor([1.0, 70000.0]).half())


def test_effective_numbers_by_hand() -> None:
    # beta 0.5: effective numbers 1 (n = 1), 1.5 (n = 2); their inverses 1 and 2/3, scaled to a mean of 1
    assert effective_number_weights(torch.tensor([1, 2]), 0.5).tolist() == pytest.approx([1.2, 0.8])
    assert effective_number_weights(torch.tensor([1, 9]), 0.0).tolist() == [1, 1]
    for beta in (1.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\)"):
            effective_number_weights(torch.tensor([1, 2]), beta)


@given(
    st.lists(st.floats(1, 1e300), min_size=1, max_size=6),
    st.floats(0, 1, exclude_max=True) | st.integers(1, 53).map(lambda digits: 1 - 2.0**-digits),
)
@example([1, 2, 1e300], 1 - 2.0**-53)  # 1 − β^n has one digit left where β^n is rounded first
@example([1, 2, 2.0**62], 1e-300)
def test_effective_numbers_of_any_counts(counts: list[float], beta: float) -> None:
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 50, -(10**17), 10**17
        powers = [Decimal(beta) ** Decimal(n) if n < 1e6 else _power(beta, n) for n in counts]
        weights = [(1 - Decimal(beta)) / (1 - power) for power in powers]
        expected = [float(weight * len(weights) / sum(weights)) for weight in weights]
    ours = effective_number_weights(counts, beta, torch.float64)
    # log β, its product, expm1, the quotients and the mean: fewer than 16 roundings and those of a sum of six
    assert ours.tolist() == pytest.approx(expected, rel=22 * 2**-52, abs=0)
    assert torch.equal(effective_number_weights(counts, beta), ours.float())


def _power(beta: float, n: float) -> Decimal:
    return (Decimal(beta).ln() * Decimal(n)).exp() if beta and math.log(beta) * n > -1e6 else Decimal(0)


def test_shares_have_no_effective_number() -> None:
    with pytest.raises(ValueError, match=r"images, 1 or more.*class 0 has 0.7\d* \(2 such of 2\); shares"):
        effective_number_weights([0.7, 0.3])
    assert log_prior([0.75, 0.25]).exp().tolist() == pytest.approx([0.75, 0.25])


def test_the_two_readings_of_compression() -> None:
    accuracy = torch.tensor([0.0, 0.19, 0.2, 0.9, float("nan")])
    assert compression_factors(accuracy).tolist() == pytest.approx([1, 1, 0.005, 0.005, 1])
    other = compression_factors(accuracy, under=0.005, rest=1.0)
    assert other.tolist() == pytest.approx([0.005, 0.005, 1, 1, 1])


def test_factors_are_the_numbers_given_whatever_the_dtypes() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        factors = compression_factors(torch.tensor([0.5, 0.1], dtype=torch.float16))
    finally:
        torch.set_default_dtype(before)
    assert factors.dtype == torch.float32
    assert factors.tolist() == pytest.approx([0.005, 1], rel=2**-24)


@pytest.mark.parametrize(
    ("accuracy", "options", "part"),
    [
        ([85.0, 3.0, 0.5], {}, r"class_accuracy .*class 0 has 85.0 \(2 such of 3\); divide percentages by 100"),
        ([0.5, -0.1], {}, "class_accuracy .*class 1 has -0.1"),
        ([0.5, math.inf], {}, "class_accuracy .*class 1 has inf"),
        ([[0.5, 0.1]], {}, r"class_accuracy must be \[C\]"),
        ([0.5, 0.1], {"threshold": 20}, r"threshold must be a fraction in \[0, 1\], got 20"),
        ([0.5, 0.1], {"threshold": math.nan}, "threshold"),
        ([0.5, 0.1], {"under": -1.0}, "under must be finite and not below 0, got -1.0"),
        ([0.5, 0.1], {"rest": math.nan}, "rest"),
        ([0.5, 0.1], {"rest": math.inf}, "rest"),
    ],
)
def test_what_is_no_fraction_or_factor_is_refused(accuracy: list[float], options: dict[str, float], part: str) -> None:
    for values in (accuracy, torch.tensor(accuracy)):
        with pytest.raises(ValueError, match=part):
            compression_factors(values, **options)
