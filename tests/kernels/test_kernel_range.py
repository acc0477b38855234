"""Rows, temperatures and counts near the ends of float32's range (tests/rcl_fast/test_range.py has the other backends).

Powers of two change no bit: z·2^k has the loss of z where rows are normalised, and z·2^k with T·4^k where they are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import PRESETS, assert_as_exact_as_plain, grad_output_of, leaves, loss_and_gradients, plain, random_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "rcl_fast"))

from cases import representable

from rcl_fast.backends import reference
from rcl_fast.backends import triton as backend
from rcl_fast.batch import ContrastiveBatch

EXPONENTS = {torch.float32: 120, torch.bfloat16: 120, torch.float16: 8}


def scaled(batch: ContrastiveBatch, exponents: Tensor) -> ContrastiveBatch:
    """The batch with row r of features, then prototypes, times 2^exponents[r]."""

    def rows(given: Tensor, powers: Tensor) -> Tensor:
        return torch.ldexp(given.detach().double(), powers[:, None]).to(given.dtype).requires_grad_()

    prototypes = None if batch.prototypes is None else rows(batch.prototypes, exponents[len(batch.features) :])
    return batch._replace(features=rows(batch.features, exponents[: len(batch.features)]), prototypes=prototypes)


def assert_same_bits(one: ContrastiveBatch, other: ContrastiveBatch, exponents: Tensor) -> None:
    """`other` is `one` with rows times 2^exponents; gradients that would be subnormal or infinite are left out."""
    losses, *gradients = loss_and_gradients(backend.losses, one)
    others, *small = loss_and_gradients(backend.losses, other)
    assert torch.equal(losses, others)
    for gradient, of_other in zip(gradients, small, strict=True):
        powers, exponents = exponents[: len(gradient)], exponents[len(gradient) :]
        expected = torch.ldexp(gradient.double(), -powers[:, None])
        # Of 16 bits' gradients some were subnormal before, and have bits now.
        held = representable(expected, gradient.dtype) & representable(gradient, gradient.dtype)
        assert held.double().mean() > 0.4
        assert torch.equal(of_other[held].double(), expected[held])


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(list(EXPONENTS)),
    preset=st.sampled_from(list(PRESETS)),
    compressed=st.booleans(),
    D=st.sampled_from([16, 21]),
    register_width=st.sampled_from([64, 0]),
    seed=st.integers(0, 1000),
)
def test_the_length_of_a_row_counts_for_nothing(
    dtype: torch.dtype,
    preset: str,
    compressed: bool,
    D: int,
    register_width: int,
    seed: int,
    tiny_tiles: Callable[..., None],
    device: torch.device,
) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, 20, 9, D, dtype=dtype, compressed=compressed, seed=seed, **PRESETS[preset])
    rows = 20 + (9 if batch.prototypes is not None else 0)
    # A value of 2^-20 stays normal at 2^-100 times that; a subnormal one would lose bits before the kernels see it.
    lowest, make = -min(EXPONENTS[dtype], 100), torch.Generator().manual_seed(seed)
    exponents = torch.randint(lowest, EXPONENTS[dtype] + 1, (rows,), generator=make).to(device)
    if dtype == torch.float16:  # no bits are lost on the way down
        batch = scaled(batch, torch.zeros_like(exponents))
        exponents = exponents.clamp(min=0)
    assert_same_bits(batch, scaled(batch, exponents), exponents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-48, -30, 30, 48])
@pytest.mark.parametrize("register_width", [64, 0], ids=["registers", "workspace"])
def test_rows_that_are_not_normalised_and_the_temperature(
    dtype: torch.dtype, exponent: int, register_width: int, tiny_tiles: Callable[..., None], device: torch.device
) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, 20, 9, 16, dtype=dtype, normalize=False, temperature=1.5)
    exponents = torch.full((29,), exponent, device=device)
    other = scaled(batch, exponents)._replace(temperature=1.5 * 4.0**exponent)
    assert_same_bits(batch, other, exponents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2e-40, 1e-30, 1e20, 1e37])
def test_the_ends_of_the_range(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    """The float64 reference gets the same rows, subnormal ones too."""
    batch = random_batch(device, 20, 9, 16, dtype=torch.float64)
    batch = batch._replace(
        features=(batch.features.detach() * scale).to(dtype).requires_grad_(),
        prototypes=(batch.prototypes.detach() * scale).to(dtype).requires_grad_(),
    )
    weights = grad_output_of(batch) * min(1.0, scale * 1e37)  # a gradient near 1e40 is no number of float32
    exactly = loss_and_gradients(reference.losses, batch, weights)
    ours = loss_and_gradients(backend.losses, batch, weights)
    logits = 10
    assert (ours[0].double() - exactly[0]).abs().max() <= 32 * torch.finfo(torch.float32).eps * logits
    for one, exact in zip(ours[1:], exactly[1:], strict=True):
        limits = torch.finfo(dtype)
        held = (exact.double().abs() >= limits.smallest_normal) & (exact.double().abs() <= limits.max)
        shares = ((one.double() - exact.double()) / exact.double().abs().amax(dim=1, keepdim=True))[held].abs()
        assert held.any()
        assert shares.max() <= 4 * limits.eps + 256 * torch.finfo(torch.float32).eps


def test_float16_rows_of_very_different_lengths(device: torch.device) -> None:
    """dlogits times a row's scale is rounded to float16: lengths must not decide what is left of it."""
    batch = random_batch(device, 30, 9, 16, dtype=torch.float16)
    with torch.no_grad():
        batch.features[:15].mul_(2.0**-14)
        batch.features[15:].mul_(2.0**9)
    assert_as_exact_as_plain(batch, yardsticks=(plain_of_unit_rows,))


def plain_of_unit_rows(batch: ContrastiveBatch) -> Tensor:
    """Plain PyTorch in float16, of rows that are normalised in float32: their squares leave float16."""

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows.float(), dim=1).to(rows.dtype)

    return plain(batch._replace(features=unit(batch.features), prototypes=unit(batch.prototypes), normalize=False))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_gives_none(normalize: bool, bad: float, device: torch.device) -> None:
    batch = random_batch(device, 20, 9, 16, normalize=normalize, temperature=1.0)
    with torch.no_grad():
        batch.features[7, 3] = bad
    assert not backend.losses(batch).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("preset", PRESETS)
def test_temperatures_at_the_ends(temperature: float, preset: str, device: torch.device) -> None:
    batch = random_batch(device, 20, 9, 16, temperature=temperature, **PRESETS[preset])
    exactly = loss_and_gradients(reference.losses, batch)
    ours = loss_and_gradients(backend.losses, batch)
    rounding = 32 * torch.finfo(torch.float32).eps
    assert (ours[0].double() - exactly[0]).abs().max() <= rounding * (1 / temperature + 10)
    for one, exact in zip(ours[1:], exactly[1:], strict=True):
        assert one.isfinite().all()
        if temperature > 1:  # below, which key is the largest may be a matter of rounding
            assert (one.double() - exact.double()).abs().max() <= 4 * rounding * exact.double().abs().max()


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor([1e300, 1.0, 1e-300, 7.0, 2e307], dtype=torch.float64),
        torch.tensor([3e38, 1.0, 1e-38, 7.0, 2e38]),
        torch.tensor([2**62, 3, 5, 1, 2**53 + 1]),
    ],
    ids=["float64", "float32", "int64"],
)
def test_counts_that_float32_does_not_hold(counts: Tensor, device: torch.device) -> None:
    batch = random_batch(device, 20, 5, 16)._replace(class_counts=counts.to(device))
    assert_bounded(batch, not counts.dtype.is_floating_point)
    exactly = loss_and_gradients(reference.losses, batch)
    ours = loss_and_gradients(backend.losses, batch)
    rounding = torch.finfo(torch.float32).eps * 1030  # log2 of the largest count
    assert (ours[0].double() - exactly[0]).abs().max() <= 4 * rounding
    for one, exact in zip(ours[1:], exactly[1:], strict=True):
        assert (one.double() - exact.double()).abs().max() <= 8 * rounding * exact.double().abs().max()


def assert_bounded(batch: ContrastiveBatch, expected: bool) -> None:
    assert backend._bounded(batch) == expected
    assert leaves(batch)
