"""The losses of logits at their door: against formulas in float64 for any input that they take; the rest is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rcl_fast import LDAM, BalancedSoftmax, CBFocal, ContrastiveLoss, CrossEntropy, LogitAdjusted

COUNTS = [900, 90, 10, 3]
BETA, GAMMA, TAU, MARGIN, SCALE = 0.99, 2.0, 1.3, 0.5, 5.0


def ldam_drw(counts: Any) -> LDAM:
    criterion = LDAM(counts, MARGIN, SCALE, BETA)
    criterion.reweight()
    return criterion


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "CrossEntropy": lambda counts: CrossEntropy(),
    "LogitAdjusted": lambda counts: LogitAdjusted(counts, TAU),
    "BalancedSoftmax": BalancedSoftmax,
    "CBFocal": lambda counts: CBFocal(counts, BETA, GAMMA),
    "LDAM": ldam_drw,
}
TAKE_SOFT_LABELS = ("CrossEntropy", "LogitAdjusted", "BalancedSoftmax")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def class_weight(n: float) -> float:
    return (1 - BETA) / (1 - BETA**n)


MEAN_WEIGHT = math.fsum(map(class_weight, COUNTS)) / len(COUNTS)


def log_softmax(row: list[float], at: int) -> float:
    return row[at] - max(row) - math.log(math.fsum(math.exp(x - max(row)) for x in row))


def written_out(name: str, row: list[float], label: int) -> tuple[float, float]:
    """The loss of one sample, times its weight, and its weight in the mean: Python's float64, from the papers."""
    prior = [math.log(n / sum(COUNTS)) for n in COUNTS]
    weight = class_weight(COUNTS[label]) / MEAN_WEIGHT
    if name == "CBFocal":
        p = [1 / (1 + math.exp(-x if j == label else x)) for j, x in enumerate(row)]
        return -weight * math.fsum((1 - p_t) ** GAMMA * math.log(p_t) for p_t in p), 1
    if name == "LDAM":
        margin = SCALE * MARGIN * (min(COUNTS) / COUNTS[label]) ** 0.25
        return -weight * log_softmax([x - margin * (j == label) for j, x in enumerate(row)], label), weight
    tau = {"CrossEntropy": 0.0, "LogitAdjusted": TAU, "BalancedSoftmax": 1.0}[name]
    return -log_softmax([x + tau * p for x, p in zip(row, prior, strict=True)], label), 1


def mean_written_out(name: str, logits: Tensor, labels: Tensor) -> float:
    rows = zip(logits.double().tolist(), labels.long().tolist(), strict=True)
    terms = [written_out(name, row, label) for row, label in rows if label != -100]
    return math.fsum(loss for loss, _ in terms) / math.fsum(weight for _, weight in terms) if terms else 0.0


def bound(logits: Tensor, dtype: torch.dtype) -> float:
    """How far a mean computed in `dtype` may be off.

    A term is a sum over C classes of numbers no larger than logits, margins and adjustments together, in the mean times
    a weight of 1. Each operation on it rounds once: fewer than 16 functions, C classes, N samples.
    """
    samples, classes = logits.shape
    largest = logits.double().abs().max().item() if samples else 0
    size = classes * (largest + SCALE * MARGIN + TAU * math.log(sum(COUNTS)))
    return torch.finfo(dtype).eps * (16 + classes + samples) * size


def draw(seed: int, samples: int, ignored: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(samples, len(COUNTS), dtype=torch.float64, generator=make)).to(dtype)
    labels = torch.randint(0, len(COUNTS), (samples,), generator=make)
    return logits, labels.masked_fill(torch.rand(samples, generator=make) < ignored, -100)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    samples=st.integers(0, 12),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(FLOATS),
    label_dtype=st.sampled_from(SIGNED + UNSIGNED),
)
def test_any_batch_against_the_formula(
    name: str, seed: int, samples: int, ignored: float, dtype: torch.dtype, label_dtype: torch.dtype
) -> None:
    logits, labels = draw(seed, samples, 0.0 if label_dtype in UNSIGNED else ignored, dtype)
    loss = LOSSES[name](COUNTS)(logits.requires_grad_(), labels.to(label_dtype))
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == computed
    assert loss.shape == ()
    assert abs(loss.item() - mean_written_out(name, logits.detach(), labels)) <= bound(logits.detach(), computed)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[labels == -100].any()
    assert samples == 0 or ignored > 0 or logits.grad.any(dim=1).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    logits, labels = draw(1, 6, 0.3)
    assert 0 < (labels == -100).sum() < 6
    criterion = LOSSES[name](COUNTS)
    assert torch.autograd.gradcheck(lambda x: criterion(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", TAKE_SOFT_LABELS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), samples=st.integers(0, 8), dtype=st.sampled_from(FLOATS))
def test_soft_labels_mix_the_losses_of_the_classes(name: str, seed: int, samples: int, dtype: torch.dtype) -> None:
    logits, labels = draw(seed, samples, 0.0, dtype)
    make = torch.Generator().manual_seed(seed)
    soft = torch.rand(samples, 4, dtype=torch.float64, generator=make).softmax(dim=1).to(dtype)
    criterion = LOSSES[name](COUNTS)
    expected = math.fsum(
        share * written_out(name, row, label)[0]
        for row, shares in zip(logits.tolist(), soft.tolist(), strict=True)
        for label, share in enumerate(shares)
    )
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = bound(logits, computed)
    assert abs(criterion(logits, soft).item() - expected / max(samples, 1)) <= tolerance
    one_hot = torch.nn.functional.one_hot(labels, 4).to(dtype)
    assert abs(criterion(logits, one_hot).item() - criterion(logits, labels).item()) <= tolerance


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 1])
def test_logits_that_are_not_finite_are_not_hidden(name: str, value: float, column: int) -> None:
    logits, _ = draw(0, 4, 0.0)
    logits[2, column] = value
    labels = torch.tensor([0, 1, 0, 3])
    assert not LOSSES[name](COUNTS)(logits, labels).isfinite()
    left_out = LOSSES[name](COUNTS)(logits, labels.index_fill(0, torch.tensor([2]), -100))
    kept = torch.tensor([0, 1, 3])
    assert left_out.item() == pytest.approx(mean_written_out(name, logits[kept], labels[kept]), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_that_is_masked_by_its_logit_has_no_part(name: str) -> None:
    logits, _ = draw(0, 4, 0.0)
    labels = torch.tensor([0, 1, 0, 1])
    far = logits.index_fill(1, torch.tensor([2]), -1e4)
    masked = logits.index_fill(1, torch.tensor([2]), -math.inf)
    assert LOSSES[name](COUNTS)(masked, labels) == LOSSES[name](COUNTS)(far, labels)
    assert LOSSES[name](COUNTS)(masked, labels.index_fill(0, torch.tensor([1]), 2)) == math.inf


X, Y = draw(0, 6, 0.0)
SOFT = X.softmax(dim=1)
MULTI_HOT = torch.tensor([[1, 0, 1, 0]] * 6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"logits": X.tolist()}, TypeError, ["logits", "torch.Tensor", "list"]),
        ({"logits": X.long()}, TypeError, ["logits", "float32", "torch.int64"]),
        ({"logits": X[0]}, ValueError, ["logits", "[N, C]", "[4]"]),
        ({"logits": X[:, :0]}, ValueError, ["logits", "C >= 1", "[6, 0]"]),
        ({"logits": X[:, :, None, None]}, ValueError, ["logits", "[6, 4, 1, 1]", "movedim"]),
        ({"labels": Y.tolist()}, TypeError, ["labels", "torch.Tensor", "list"]),
        ({"labels": Y[:5]}, ValueError, ["labels", "[6]", "[5]"]),
        ({"labels": Y[:, None]}, ValueError, ["labels", "[6]", "[6, 1]"]),
        ({"labels": Y.float()}, TypeError, ["labels", "torch.float32", "whole numbers", "labels.long()"]),
        ({"labels": Y > 0}, TypeError, ["labels", "torch.bool"]),
        ({"labels": MULTI_HOT}, ValueError, ["labels", "[6, 4]", "single 1"]),
        ({"labels": MULTI_HOT > 0}, TypeError, ["labels", "torch.bool [6, 4]", "multi-hot"]),
        ({"labels": Y.index_fill(0, torch.tensor([2]), 4)}, ValueError, ["[0, 4)", "-100", "sample 2 has 4 (1 such"]),
        ({"labels": Y.index_fill(0, torch.tensor([2]), -1)}, ValueError, ["labels", "sample 2 has -1"]),
        ({"labels": Y.index_fill(0, torch.tensor([5]), -99)}, ValueError, ["labels", "sample 5 has -99"]),
        ({"labels": torch.full((6,), 156, dtype=torch.uint8)}, ValueError, ["sample 0 has 156 (6 such of 6)"]),
        ({"labels": Y.to("meta")}, ValueError, ["labels is on meta, logits on cpu"]),
    ],
)
def test_bad_input_is_refused(name: str, changes: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        LOSSES[name](COUNTS)(**{"logits": X, "labels": Y, **changes})
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", TAKE_SOFT_LABELS)
@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (MULTI_HOT.float(), ["sum to 1", "sample 0 sums to 2", "labels / labels.sum"]),
        (SOFT * 100, ["sum to 1", "sample 0 sums to 100"]),
        (X - X.mean(dim=1, keepdim=True) + 0.25, ["none below 0", "its least is -"]),
        (SOFT * float("nan"), ["sums to nan"]),
        (SOFT[:, :3], ["probabilities [6, 4]", "[6, 3]"]),
        (Y[:, None].float(), ["integers [6]", "[6, 1]"]),
        (SOFT.to("meta"), ["labels is on meta"]),
    ],
)
def test_soft_labels_that_are_no_probabilities_are_refused(name: str, labels: Tensor, parts: list[str]) -> None:
    with pytest.raises(ValueError, match="labels") as raised:
        LOSSES[name](COUNTS)(X, labels)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", ["CBFocal", "LDAM", "ContrastiveLoss"])
@pytest.mark.parametrize("labels", [SOFT, MULTI_HOT.float(), MULTI_HOT > 0])
def test_no_message_advises_to_cut_soft_labels_to_whole_numbers(name: str, labels: Tensor) -> None:
    make = LOSSES.get(name, ContrastiveLoss)
    with pytest.raises(TypeError, match=r"soft and multi-hot labels have no meaning here.*lam \* loss") as raised:
        make(COUNTS)(X, labels)
    assert "long()" not in str(raised.value)


@pytest.mark.parametrize("name", ["LogitAdjusted", "BalancedSoftmax", "CBFocal", "LDAM"])
def test_logits_of_other_classes_are_refused(name: str) -> None:
    criterion = LOSSES[name](COUNTS)
    for logits in (X[:, :1], X[:, :3], torch.cat([X, X], dim=1)):
        with pytest.raises(ValueError, match=r"logits must have one column per class, \[N, 4\]"):
            criterion(logits, torch.zeros(6).long())
    with pytest.raises(ValueError, match="class_counts is on meta, logits on cpu"):
        criterion.to("meta")(X, Y)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "name", "bad"),
    [
        (LogitAdjusted, "tau", [NAN, INF, -INF, -1.0]),
        (CBFocal, "gamma", [NAN, INF, -0.5]),
        (CBFocal, "beta", [NAN, INF, -0.1, 1.0, 1.5]),
        (LDAM, "beta", [NAN, INF, -0.1, 1.0, 1.5]),
        (LDAM, "max_margin", [NAN, INF, -0.5]),
        (LDAM, "scale", [NAN, INF, -30.0, 0.0]),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[..., nn.Module], name: str, bad: list[float]) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=f"{name} must .*, got {value}"):
            make(COUNTS, **{name: value})
    for value in ("1", None, True, torch.tensor(0.5)):
        with pytest.raises(TypeError, match=f"{name} must be a Python number, got {type(value).__name__}"):
            make(COUNTS, **{name: value})


@pytest.mark.parametrize("name", ["LogitAdjusted", "BalancedSoftmax", "CBFocal", "LDAM"])
@pytest.mark.parametrize("wrong", [0, -3, NAN, INF])
def test_counts_that_are_none_are_refused(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"class_counts must be finite and above 0.*; class 1 has {wrong}"):
        LOSSES[name]([5, wrong, 3, 3])


def test_shares_have_margins_and_no_effective_number() -> None:
    shares = LDAM([0.7, 0.2, 0.1])
    torch.testing.assert_close(shares.margins, LDAM([7, 2, 1]).margins)
    for make in (CBFocal, lambda counts: shares.reweight()):
        with pytest.raises(ValueError, match=r"1 or more, to have an effective number; class 0 has 0.7"):
            make([0.7, 0.2, 0.1])


def test_margins_of_counts_whose_quotient_underflows() -> None:
    assert LDAM([1e300, 1e-300], 1.0, 1.0).margins.tolist() == pytest.approx([1e-150, 1], rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float16, torch.float32])
def test_counts_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    counts = torch.tensor([200, 90, 10, 3])
    assert LOSSES[name](counts.to(dtype))(X, Y) == LOSSES[name](counts)(X, Y)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_in_one_graph(name: str) -> None:
    """With labels that are not read: none is refused, and no graph is broken."""
    torch.compiler.reset()
    criterion = LOSSES[name](COUNTS)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples, ignored in [(7, 0.3), (5, 1.0), (0, 0.0)]:
        logits, labels = draw(samples, samples, ignored)
        one, other = (logits.clone().requires_grad_() for _ in range(2))
        torch.testing.assert_close(compiled(one, labels), criterion(other, labels))
        compiled(one, labels).backward()
        criterion(other, labels).backward()
        torch.testing.assert_close(one.grad, other.grad)
    if name in TAKE_SOFT_LABELS:
        torch.testing.assert_close(compiled(X, SOFT), criterion(X, SOFT))


@pytest.mark.parametrize("name", LOSSES)
def test_under_vmap(name: str) -> None:
    criterion = LOSSES[name](COUNTS)
    logits, labels = (torch.stack(parts) for parts in zip(*(draw(seed, 5, 0.3) for seed in range(3)), strict=True))
    expected = torch.stack([criterion(*batch) for batch in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(criterion)(logits, labels), expected)


@pytest.mark.skipif(
    torch.__version__ < "2.10" and not torch.cuda.is_available(),
    reason="before PyTorch 2.10 an index or a gradient of a fake CUDA tensor asks for CUDA's driver",
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_a_gpu(name: str) -> None:
    """A fake CUDA tensor has no values: whatever reads one, which would be a synchronisation, raises."""
    criterion = LOSSES[name](COUNTS)
    with FakeTensorMode():
        criterion._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        logits = torch.empty(6, 4, device="cuda", requires_grad=True)
        labels = [torch.zeros(6, dtype=torch.int32, device="cuda")]
        if name in TAKE_SOFT_LABELS:
            labels.append(torch.ones(6, 4, device="cuda"))
        for each in labels:
            assert criterion(logits, each).device.type == "cuda"
