"""The judgement of the kernels: right ones pass whatever a GPU does to their products and sums, wrong ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import batches
import pytest
import shipped
import torch
from batches import PRESETS, assert_as_exact_as_plain, loss_and_gradients, plain, random_batch, truncate, truncated
from torch import Tensor

from rcl_fast.backends import reference
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.kernels import block_sizes

Product = Callable[[Tensor, Tensor], Tensor]

CPU = torch.device("cpu")
TF32 = [
    case
    for case in shipped.gpu_cases()
    if case.dtype == torch.float32 and case.precision == "high" and case.N < 1000 and case.D in (8, 128, 320)
]
WIDE = random_batch(CPU, 60, 40, 2048)
MANY = random_batch(CPU, 600, 200, 16)


def simulated(batch: ContrastiveBatch, product: Product, added: Tensor | float = 0.0) -> Tensor:
    """ℓ_i as kernels/README.md has it, in float32, with these products; added: to t + b of each pair, [N, M]."""
    return _Simulated.apply(batch.features, batch.prototypes, batch, product, added)


class _Simulated(torch.autograd.Function):
    """With prototypes, rebalance, class_average and normalize, as the shipped cases are."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        batch: ContrastiveBatch,
        product: Product,
        added: Tensor | float,
    ) -> Tensor:
        N, C = len(features), len(prototypes)
        z, y = torch.cat([features, prototypes]), torch.cat([batch.labels, torch.arange(C)])
        count = torch.bincount(y, minlength=C).float()
        r = math.sqrt(math.log2(math.e) / batch.temperature) / z.square().sum(1).sqrt()
        if batch.compression is not None:
            r *= batch.compression[y]
        log_n = batch.class_counts.float().log2()
        same, itself = y[:N, None] == y, torch.eye(N, len(z), dtype=torch.bool)
        share = (same & ~itself) / (count - 1)[y[:N], None]

        t = product(z[:N], z.T) * (r[:N, None] * r)
        x = t + same * same_class_term(batch)[:, None] + (log_n - count.log2())[y] + added
        x = x.masked_fill(itself, -torch.inf)
        lse = x.amax(1) + (x - x.amax(1, keepdim=True)).exp2().sum(1).log2()
        ctx.save_for_backward(z, r, x - lse[:, None], share)
        ctx.product = product
        return math.log(2) * (lse - (t * share).sum(1) - log_n[batch.labels])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, r, log_p, share = ctx.saved_tensors
        N = len(grad_output)
        G = grad_output[:, None] * (log_p.exp2() - share)
        for_anchors = torch.cat([G[:, :N] + G[:, :N].T, G[:, N:]], dim=1)
        u = torch.cat([ctx.product(for_anchors * r, z), ctx.product(G[:, N:].T * r[:N], z[:N])])
        u *= math.log(2) * r[:, None]
        u -= z * ((z * u).sum(1, keepdim=True) / z.square().sum(1, keepdim=True))
        return u[:N], u[N:], None, None, None


def same_class_term(batch: ContrastiveBatch) -> Tensor:
    """γ of each anchor's class [N]; with its prototype every class has a key more than it has anchors."""
    count = torch.bincount(batch.labels, minlength=batch.num_classes)[batch.labels] + 1.0
    return (count / (count - 1)).log2()


def in_tf32(left: Tensor, right: Tensor) -> Tensor:
    """As tensor cores multiply float32: the low bits of the operands are not looked at."""
    return truncate(left).float() @ truncate(right).float()


def in_bfloat16(left: Tensor, right: Tensor) -> Tensor:
    return left.bfloat16().float() @ right.bfloat16().float()


def one_by_one(left: Tensor, right: Tensor) -> Tensor:
    """float32 sums whose terms are added one after the other, as a GPU without tensor cores adds them."""
    total = left.new_zeros(len(left), right.shape[1])
    for column, row in zip(left.T, right, strict=True):
        total += column[:, None] * row
    return total


def losing_a_term(left: Tensor, right: Tensor, of: int) -> Tensor:
    """The last term is missing in sums of so many."""
    terms = left.shape[1] - (left.shape[1] == of)
    return left[:, :terms] @ right[:terms]


def batch_of(case: shipped.Shipped) -> ContrastiveBatch:
    return random_batch(CPU, case.N, case.C, case.D, compressed=case.compressed)


def without_the_last_key(batch: ContrastiveBatch) -> Tensor:
    M = len(batch.features) + len(batch.prototypes)
    return torch.zeros(M).index_fill(0, torch.tensor([M - 1]), -torch.inf)


def without_one_same_class_term(batch: ContrastiveBatch) -> Tensor:
    """What is added where one anchor meets its class: the anchor to which the term means most."""
    terms = same_class_term(batch)
    row = int((terms * batch.class_counts[batch.labels]).argmax())
    labels = torch.cat([batch.labels, torch.arange(batch.num_classes)])
    added = torch.zeros(len(terms), len(labels))
    added[row] = -terms[row] * (labels == labels[row])
    return added


judge_tf32 = partial(assert_as_exact_as_plain, truth=shipped.in_float64, yardsticks=(plain, truncated))
judge_exact = partial(assert_as_exact_as_plain, truth=shipped.in_float64)


@pytest.mark.parametrize("case", TF32, ids=str)
def test_truncation_by_the_hardware_passes(case: shipped.Shipped) -> None:
    judge_tf32(batch_of(case), loss=partial(simulated, product=in_tf32))


@pytest.mark.parametrize("case", TF32, ids=str)
def test_bfloat16_does_not_pass_as_tf32(case: shipped.Shipped) -> None:
    with pytest.raises(AssertionError, match="yardstick"):
        judge_tf32(batch_of(case), loss=partial(simulated, product=in_bfloat16))


@pytest.mark.parametrize("case", TF32, ids=str)
def test_a_lost_key_does_not_pass_as_truncation(case: shipped.Shipped) -> None:
    batch = batch_of(case)
    with pytest.raises(AssertionError, match="yardstick"):
        judge_tf32(batch, loss=partial(simulated, product=in_tf32, added=without_the_last_key(batch)))


@pytest.mark.parametrize("batch", [WIDE, MANY], ids=["2048 features", "800 keys"])
def test_sums_of_one_term_after_the_other_pass(batch: ContrastiveBatch) -> None:
    """By the rounding alone, as if plain PyTorch happened to be exact."""
    judge_exact(batch, loss=partial(simulated, product=one_by_one), yardsticks=[shipped.in_float64])


@pytest.mark.parametrize("fault", [without_the_last_key, without_one_same_class_term])
@pytest.mark.parametrize("batch", [WIDE, MANY], ids=["2048 features", "800 keys"])
def test_a_wrong_log_weight_does_not_pass(batch: ContrastiveBatch, fault: Callable) -> None:
    with pytest.raises(AssertionError, match="yardstick"):
        judge_exact(batch, loss=partial(simulated, product=torch.matmul, added=fault(batch)))


@pytest.mark.parametrize(
    ("batch", "terms"),
    [(WIDE, 2048), (WIDE, 60), (WIDE, 100), (MANY, 600), (MANY, 800)],
    ids=["feature", "prototypes' key", "anchors' key", "prototypes' key of many", "anchors' key of many"],
)
def test_a_sum_without_its_last_term_does_not_pass(batch: ContrastiveBatch, terms: int) -> None:
    with pytest.raises(AssertionError, match="yardstick"):
        judge_exact(batch, loss=partial(simulated, product=partial(losing_a_term, of=terms)))


@pytest.mark.parametrize("batch", [WIDE, MANY], ids=["2048 features", "800 keys"])
def test_truncation_does_not_pass_where_products_are_exact(batch: ContrastiveBatch) -> None:
    with pytest.raises(AssertionError, match="yardstick"):
        judge_exact(batch, loss=partial(simulated, product=in_tf32))


@pytest.mark.parametrize(
    "options",
    [*PRESETS.values(), {"compressed": True}, {"normalize": False, "temperature": 1.0}],
    ids=str,
)
def test_truncated_is_the_loss_but_for_its_cuts(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(CPU, 23, 11, 12, dtype=torch.float64, **options)
    with torch.no_grad():
        batch.features[3] = 0
    exactly = loss_and_gradients(reference.losses, batch)
    cut = loss_and_gradients(truncated, batch)
    monkeypatch.setattr(batches, "truncate", lambda numbers: numbers)
    for exact, one, uncut in zip(exactly, cut, loss_and_gradients(truncated, batch), strict=True):
        torch.testing.assert_close(uncut, exact, rtol=1e-12, atol=1e-12)
        assert 2.0**-16 < (one - exact).abs().max() / exact.abs().max() < 2.0**-6


def test_truncate_drops_thirteen_bits_towards_zero() -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    cut = truncate(numbers)
    assert cut.float().view(torch.int32).bitwise_and(0x1FFF).eq(0).all()
    lost = 1 - cut / numbers.float()
    assert (lost >= 0).all()
    assert 2.0**-11 < lost.max() < 2.0**-10
    assert torch.equal(truncate(-numbers), -cut)
    assert torch.equal(truncate(cut), cut)


@pytest.mark.parametrize(
    ("dtype", "precision", "device", "expected"),
    [
        (torch.float32, "high", "cuda", (plain, truncated)),
        (torch.float32, "highest", "cuda", (plain,)),
        (torch.float16, "high", "cuda", (plain,)),
        (torch.float32, "high", "cpu", (plain,)),  # the interpreter's products are exact
    ],
)
def test_only_tf32_is_given_its_truncation(
    dtype: torch.dtype, precision: str, device: str, expected: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_sizes, "processor", lambda _: block_sizes.Processor(90, 132))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert shipped.yardsticks(dtype, torch.device(device)) == expected
    finally:
        torch.set_float32_matmul_precision(before)
