"""Numbers near the ends of a dtype's range: rows, temperatures, counts. Right, or refused.

Powers of two change no bit of a product: z·2^k has the loss of z where rows are normalised, and z·2^k with T·4^k where
they are not; the gradient is that of z over 2^k. Both hold to the bit, with no tolerance, as long as no number that
went in or comes out is subnormal or infinite.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, draw_case, representable
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Processes
from test_distributed import in_a_process, together
from test_functional import run
from torch import Tensor

from rcl_fast import ContrastiveLoss, contrastive_loss

BACKENDS = ["reference", "dense", "tiled"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EXPONENTS = {torch.float64: 960, torch.float32: 110, torch.bfloat16: 110}  # of rows that are near 1 to begin with
OPTIONS = [
    {"prototypes": False},
    {"class_average": True},
    {"rebalance": True, "class_average": True},
    {"rebalance": True, "compression": True},
]


def scaled(case: Case, exponents: Tensor) -> Case:
    """The case with row r of features, then prototypes, times 2^exponents[r]."""
    copied = case.to(case["features"].dtype)
    rows = [name for name in ("features", "prototypes") if case[name] is not None]
    for name, powers in zip(rows, exponents.split([len(case[name]) for name in rows]), strict=True):
        copied[name] = torch.ldexp(case[name].detach().double(), powers[:, None]).to(case[name].dtype).requires_grad_()
    return copied


def exponents_of(case: Case, largest: int, seed: int) -> Tensor:
    rows = len(case["features"]) + (0 if case["prototypes"] is None else len(case["prototypes"]))
    return torch.randint(-largest, largest + 1, (rows,), generator=torch.Generator().manual_seed(seed))


def assert_same_bits(one: Case, other: Case, exponents: Tensor, **options: Any) -> None:
    """`other` is `one` with rows times 2^exponents; gradients that would be subnormal or infinite are left out."""
    assert torch.equal(run(one, **options), run(other, **options))
    for gradient, small in zip(one.gradients(), other.gradients(), strict=True):
        powers, exponents = exponents[: len(gradient)], exponents[len(gradient) :]
        expected = torch.ldexp(gradient.double(), -powers[:, None])
        held = representable(expected, gradient.dtype)
        assert held.double().mean() > 0.5
        assert torch.equal(small[held].double(), expected[held])


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(["dense", "tiled"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_the_length_of_a_row_counts_for_nothing(
    dtype: torch.dtype, backend: str, reduction: str, options: dict[str, Any], seed: int, share: float
) -> None:
    case = draw_case(20, 6, 5, seed=seed, **options).to(dtype)
    exponents = exponents_of(case, int(share * EXPONENTS[dtype]), seed)
    assert_same_bits(case.to(dtype), scaled(case, exponents), exponents, backend=backend, reduction=reduction)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(["dense", "tiled"]),
    reduction=st.sampled_from(["mean", "none"]),
    options=st.sampled_from(OPTIONS),
    exponent=st.integers(-48, 48),
)
def test_rows_that_are_not_normalised_and_the_temperature(
    dtype: torch.dtype, backend: str, reduction: str, options: dict[str, Any], exponent: int
) -> None:
    case = draw_case(20, 6, 5, normalize=False, temperature=1.5, **options).to(dtype)
    exponents = exponents_of(case, 0, 0) + exponent
    other = scaled(case, exponents)
    other["temperature"] = 1.5 * 4.0**exponent
    # The gradient by z is that by z·2^k times 2^k.
    assert_same_bits(case.to(dtype), other, exponents, backend=backend, reduction=reduction)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_the_reference_keeps_to_it_too(scale: float) -> None:
    case = draw_case(20, 6, 5, class_average=True)
    other = case.to(torch.float64)
    other["features"] = (case["features"].detach() * scale).requires_grad_()
    other["prototypes"] = (case["prototypes"].detach() * scale).requires_grad_()
    torch.testing.assert_close(run(case, "reference"), run(other, "reference"), rtol=1e-13, atol=0)
    for gradient, small in zip(case.gradients(), other.gradients(), strict=True):
        torch.testing.assert_close(small * scale, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2e-40, 1e-24, 1e20, 1e37])
def test_rows_whose_numbers_are_rounded_too(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Subnormal rows lose bits before they come here: the reference gets the same ones."""
    case = draw_case(20, 6, 5, class_average=True)
    with torch.no_grad():
        for name in ("features", "prototypes"):
            case[name].mul_(scale)
    ours = case.to(dtype)
    exact = ours.to(torch.float64)
    loss, truth = run(ours, backend), run(exact, "reference")
    assert abs(loss.item() - truth.item()) <= 20 * torch.finfo(torch.float32).eps * 10  # logits are up to 10
    limits = torch.finfo(dtype)
    for gradient, right in zip(ours.gradients(), exact.gradients(), strict=True):
        held = (right.abs() >= limits.smallest_normal) & (right.abs() <= limits.max)
        error = ((gradient.double() - right) / right.abs().amax(dim=1, keepdim=True))[held].abs()
        assert not error.numel() or error.max() <= 2 * limits.eps + 200 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_no_number_gives_none(backend: str, bad: float, normalize: bool, reduction: str) -> None:
    case = draw_case(20, 6, 5, class_average=True, normalize=normalize).to(torch.float32)
    with torch.no_grad():
        case["features"][7, 2] = bad
    assert not run(case, backend, reduction).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "counts", [[1e300, 1.0, 1e-300, 7.0, 2e307], [2**62, 3, 5, 1, 2**53 + 1]], ids=["float", "int"]
)
def test_counts_that_float32_does_not_hold(
    backend: str, reduction: str, dtype: torch.dtype, counts: list[float]
) -> None:
    case = draw_case(20, 6, 5, class_average=True, rebalance=True).to(dtype)
    case["class_counts"] = torch.tensor(counts, dtype=torch.float64 if isinstance(counts[0], float) else None)
    exact = case.to(torch.float64)
    rounding = torch.finfo(dtype).eps * 710  # the logarithms' magnitude
    torch.testing.assert_close(
        run(case, backend, reduction).double(), run(exact, "reference", reduction), rtol=0, atol=4 * rounding
    )
    for gradient, right in zip(case.gradients(), exact.gradients(), strict=True):
        # A logit that is off by a rounding changes a probability by as large a share of it.
        assert (gradient.double() - right).abs().max() <= 8 * rounding * right.abs().max()


@pytest.mark.parametrize("temperature", [0.99e-30, 1e-46, 1e-320, 1.01e30, 1e39, 1e300])
def test_a_temperature_that_leaves_the_range_is_refused(temperature: float) -> None:
    case = draw_case(20, 6, 5, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be above 0, from 1e-30 to 1e\\+30"):
        contrastive_loss(**case)
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveLoss(temperature=temperature)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_temperatures_at_the_ends(backend: str, reduction: str, temperature: float, options: dict[str, Any]) -> None:
    case = draw_case(20, 6, 5, temperature=temperature, **options).to(torch.float32)
    exact = case.to(torch.float64)
    loss, truth = run(case, backend, reduction), run(exact, "reference", reduction)
    anchors = 20 if reduction == "sum" else 1
    # A logit has D products and a few roundings of up to τ²/T, with τ up to 1.5; the logarithms are up to 7.
    rounding = torch.finfo(torch.float32).eps * anchors * (16 * 2.25 / temperature + 4 * 14)
    assert (loss.double() - truth).abs().max() <= rounding
    for gradient, right in zip(case.gradients(), exact.gradients(), strict=True):
        assert gradient.isfinite().all()
        if temperature > 1:  # below, which key is the largest may be a matter of rounding
            assert (gradient.double() - right).abs().max() <= 64 * torch.finfo(torch.float32).eps * right.abs().max()


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("long", [1e3, 1e6])
def test_a_long_row_does_not_hide_the_short_ones_of_its_class(backend: str, reduction: str, long: float) -> None:
    """Its own square is no logit: what else it is compared with is short."""
    case = draw_case(20, 6, 5, prototypes=False, normalize=False, temperature=1e4)
    with torch.no_grad():
        case["features"][0] *= long
    case = case.to(torch.float32)
    exact = case.to(torch.float64)
    loss, truth = run(case, backend, reduction).double(), run(exact, "reference", reduction)
    products = exact["features"].detach().norm(dim=1)[:, None] * exact["features"].detach().norm(dim=1)
    logits = products.fill_diagonal_(0).amax(dim=1) / 1e4  # the largest that each anchor may have
    rounding = 16 * torch.finfo(torch.float32).eps * (logits + 4)
    assert ((loss - truth).abs() <= (rounding if reduction == "none" else rounding.mean())).all()
    gradient, right = case["features"].grad.double(), exact["features"].grad
    shares = (gradient - right).norm(dim=1) / right.norm(dim=1)
    assert shares.max() <= 64 * torch.finfo(torch.float32).eps * (1 + logits.max())


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_anchor_may_be_too_long_for_its_own_square(backend: str, reduction: str) -> None:
    """No anchor is compared with itself."""
    features = torch.tensor([[3e19, 0.0], [2e-19, 0.0], [0.0, 1.0], [0.0, 0.5]], requires_grad=True)
    exact = features.detach().double().requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    options = {"temperature": 1.0, "normalize": False, "reduction": reduction}
    for rows, by in ((features, backend), (exact, "reference")):
        contrastive_loss(rows, labels, backend=by, **options).sum().backward()
    # A row's gradient is a difference of sums of the other rows, of which anchor 0 has only short ones.
    magnitudes = torch.tensor([1.0, 3e19, 3e19, 3e19])[:, None]
    assert ((features.grad.double() - exact.grad).abs() <= 8 * torch.finfo(torch.float32).eps * magnitudes).all()


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_over_several_processes(processes: Processes, backend: str, reduction: str) -> None:
    case = draw_case(30, 7, class_average=True, rebalance=True).to(torch.float32)
    exponents = exponents_of(case, 100, 3)
    grad_output = torch.linspace(-1, 2, 30)
    options = {"backend": backend, "reduction": reduction}
    plain, other = (
        together(processes.run(2, in_a_process, one, grad_output, [21, 9], 4_000, options), reduction)
        for one in (case, scaled(case, exponents))
    )
    assert torch.equal(plain[0], other[0])
    for one, small, powers in zip(plain[1:], other[1:], exponents.split([30, 9]), strict=True):
        expected = torch.ldexp(one.double(), -powers[:, None])
        held = representable(expected, torch.float32, margin=4)
        assert torch.equal(small[held].double(), expected[held])


def in_classes(copies: int) -> Case:
    """Anchors of five classes, each class in a direction of its own, as many copies of each of its rows."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.linalg.qr(torch.randn(8, 5, generator=generator, dtype=torch.float64)).Q.T
    rows = centres.repeat_interleave(3, dim=0) + 0.1 * torch.randn(15, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(5).repeat_interleave(3 * copies)
    # Halves of float32's digits: float64 holds the products of such numbers, and float32 many of them.
    return Case(features=rows.repeat_interleave(copies, dim=0).float().half().double(), labels=labels, prototypes=None)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("size", [1e1, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("normalize", [False, True])
def test_large_logits(backend: str, reduction: str, copies: int, size: float, normalize: bool) -> None:
    """Copies of a row share its probability, whatever is lost to rounding next to logits of such size."""
    case = in_classes(copies)
    case |= {"normalize": normalize, "temperature": 1 / size}
    ours, exact = Case(case).to(torch.float32), Case(case).to(torch.float64)
    loss, truth = run(ours, backend, reduction), run(exact, "reference", reduction)
    rounding = 16 * torch.finfo(torch.float32).eps * (size + 4)
    assert (loss.double() - truth).abs().max() <= rounding
    gradient, right = ours["features"].grad.double(), exact["features"].grad
    # A logit that is off by a rounding changes a probability by as large a share of it, and by all of it at most.
    magnitude = size * (2 if reduction == "none" else 2 / len(right))
    assert (gradient - right).abs().max() <= min(8 * rounding, 0.1) * magnitude


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
def test_large_logits_over_several_processes(processes: Processes, backend: str, size: float) -> None:
    case = in_classes(2).to(torch.float32)
    case["temperature"] = 1 / size
    exact = case.to(torch.float64)
    grad_output = torch.ones(30)
    run(exact, "reference", "none", grad_output.double())
    results = processes.run(
        2, in_a_process, case, grad_output, [17, 13], 4_000, {"backend": backend, "reduction": "none"}
    )
    error = (together(results, "none")[1].double() - exact["features"].grad).abs().max()
    assert error <= min(8 * 16 * torch.finfo(torch.float32).eps * size, 0.1) * 2 * size


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "long"), [(torch.float64, 1e5), (torch.float64, 1e9), (torch.float32, 1e10)])
def test_no_sum_is_made_with_a_row_that_is_taken_out_again(
    backend: str, reduction: str, dtype: torch.dtype, long: float
) -> None:
    """All logits are near 1; the square of the long row, 1e10 to 1e20, is none of them."""
    features = torch.tensor([[long, 0.0], [1 / long, 0.0], [0.0, 1.0], [0.0, 0.5]], dtype=dtype, requires_grad=True)
    exact = features.detach().double().requires_grad_()
    labels, options = torch.tensor([0, 0, 1, 1]), {"temperature": 1.0, "normalize": False, "reduction": reduction}
    loss = contrastive_loss(features, labels, backend=backend, **options)
    truth = contrastive_loss(exact, labels, backend="reference", **options)
    eps = torch.finfo(dtype).eps
    assert (loss.double() - truth).abs().max() <= 8 * eps
    (gradient,), (right,) = torch.autograd.grad(loss.sum(), features), torch.autograd.grad(truth.sum(), exact)
    magnitudes = torch.tensor([1.0, long, long, long], dtype=torch.float64)[:, None]  # of the other rows
    assert ((gradient.double() - right).abs() <= 8 * eps * magnitudes).all()
    assert (gradient[0, 0].double() - right[0, 0]).abs() <= 8 * eps / long


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.1, 1e-8, 1e-30])
def test_a_single_anchor_has_no_gradient(backend: str, reduction: str, temperature: float) -> None:
    case = draw_case(1, 4, prototypes=False, temperature=temperature).to(torch.float32)
    assert run(case, backend, reduction).sum() == 0
    assert case["features"].grad.tolist() == [[0, 0, 0, 0]]
