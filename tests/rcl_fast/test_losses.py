"""The modules: presets, and the cross-entropy side against formulas written out or numbers worked by hand."""

import math

import pytest
import torch
from cases import draw_case
from torch.nn import functional as F

from rcl_fast import (
    LDAM,
    BalancedSoftmax,
    CBFocal,
    ContrastiveLoss,
    CrossEntropy,
    LogitAdjusted,
    contrastive_loss,
)

COUNTS = torch.tensor([900, 90, 10])
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-1.0, 0.0, 3.0], [1.5, 1.0, -2.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("name", "class_average", "rebalance", "prototypes"),
    [
        ("scl", False, False, False),
        ("bcl", True, False, True),
        ("scl_rcl", False, True, False),
        ("bcl_rcl", True, True, True),
    ],
)
def test_presets(name: str, class_average: bool, rebalance: bool, prototypes: bool) -> None:
    case = draw_case(prototypes=prototypes, class_average=class_average, rebalance=rebalance)
    criterion = ContrastiveLoss.preset(name, case["class_counts"])
    assert criterion(case["features"], case["labels"], case["prototypes"]) == contrastive_loss(**case)
    with pytest.raises(ValueError, match="prototypes"):
        criterion(case["features"], case["labels"], None if prototypes else torch.randn(9, 20))


def test_a_preset_takes_the_other_options_but_not_its_own() -> None:
    assert ContrastiveLoss.preset("scl", COUNTS, temperature=0.5).temperature == 0.5
    with pytest.raises(TypeError, match="sets rebalance"):
        ContrastiveLoss.preset("scl", COUNTS, rebalance=True)
    with pytest.raises(ValueError, match="'bcl_rcl'"):
        ContrastiveLoss.preset("rcl", COUNTS)


def test_compression_can_be_set_and_unset() -> None:
    case = draw_case(prototypes=False)
    criterion = ContrastiveLoss(case["class_counts"])
    without = criterion(case["features"], case["labels"])
    factors = torch.linspace(0.1, 1, 9)
    criterion.set_compression(factors)
    compressed = criterion(case["features"], case["labels"])
    assert compressed == contrastive_loss(case["features"], case["labels"], compression=factors)
    assert compressed != without
    criterion.set_compression(None)
    assert criterion(case["features"], case["labels"]) == without


def test_cross_entropy_and_logit_adjustment_written_out() -> None:
    prior = COUNTS.double() / COUNTS.sum()
    for criterion, tau in [
        (CrossEntropy(), 0.0),
        (LogitAdjusted(COUNTS, tau=0.0), 0.0),
        (LogitAdjusted(COUNTS, tau=1.3), 1.3),
        (BalancedSoftmax(COUNTS), 1.0),
    ]:
        weighted = prior**tau * LOGITS.exp()
        expected = -(weighted[range(4), LABELS] / weighted.sum(dim=1)).log().mean()
        torch.testing.assert_close(criterion(LOGITS, LABELS), expected)


def test_balanced_softmax_is_about_counts_not_shares() -> None:
    torch.testing.assert_close(BalancedSoftmax(COUNTS)(LOGITS, LABELS), BalancedSoftmax(COUNTS * 7)(LOGITS, LABELS))


def test_cb_focal_written_out() -> None:
    beta, gamma = 0.99, 2.0
    weights = (1 - beta) / (1 - beta ** COUNTS.double())
    weights = weights / weights.mean()
    total = 0.0
    for logits, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        for j, logit in enumerate(logits):
            p = 1 / (1 + math.exp(-logit if j == label else logit))
            total -= weights[label].item() * (1 - p) ** gamma * math.log(p)
    ours = CBFocal(COUNTS, beta=beta, gamma=gamma)(LOGITS, LABELS)
    assert ours.item() == pytest.approx(total / 4, rel=1e-5)


def test_cb_focal_is_finite_for_huge_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = CBFocal(COUNTS)(logits, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_ldam_margins() -> None:
    # n^(-1/4), the rarest class at max_margin: (10/900)^(1/4) = 0.32467, (10/90)^(1/4) = 0.57735
    criterion = LDAM(COUNTS, max_margin=0.5, scale=30)
    expected = torch.tensor([0.162335, 0.288675, 0.5], dtype=torch.float64)
    torch.testing.assert_close(criterion.margins / 30, expected, rtol=1e-5, atol=0)
    lowered = LOGITS.clone()
    for row, label in enumerate(LABELS):
        lowered[row, label] -= criterion.margins[label].item()
    torch.testing.assert_close(criterion(LOGITS, LABELS), F.cross_entropy(lowered, LABELS))


def test_ldam_reweights_when_told() -> None:
    criterion = LDAM(COUNTS)
    before = criterion(LOGITS, LABELS)
    criterion.reweight()
    assert criterion(LOGITS, LABELS) != before


@pytest.mark.parametrize("make", [LogitAdjusted, BalancedSoftmax, CBFocal, LDAM])
def test_a_class_without_images_is_refused(make: type) -> None:
    with pytest.raises(ValueError, match="class 1 has 0"):
        make([5, 0, 3])


@pytest.mark.parametrize("make", [lambda c: CrossEntropy(), LogitAdjusted, BalancedSoftmax, CBFocal, LDAM])
def test_half_precision_logits_are_computed_in_float32(make: type) -> None:
    logits = LOGITS.to(torch.bfloat16)
    loss = make(COUNTS)(logits, LABELS)
    assert loss.dtype == torch.float32
    assert loss == make(COUNTS)(logits.float(), LABELS)
