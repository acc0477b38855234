"""Accuracies on confusion matrices small enough to work by hand; calibration against a plain loop."""

import math

import pytest
import torch

from rcl_fast import metrics

# Class 0: 8 of 10, class 1: 2 of 4, class 2: 0 of 1, class 3 has no sample.
CONFUSION = torch.tensor([[8, 1, 1, 0], [1, 2, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
COUNTS = torch.tensor([101, 100, 20, 19])


def test_confusion_counts_pairs() -> None:
    labels, predictions = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 0])
    expected = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert torch.equal(metrics.confusion_matrix(labels, predictions, 3), expected)


def test_per_class_and_its_means() -> None:
    accuracy = metrics.per_class_accuracy(CONFUSION)
    assert accuracy[:3].tolist() == [0.8, 0.5, 0.0]
    assert accuracy[3].isnan()
    assert metrics.balanced_accuracy(accuracy) == pytest.approx(1.3 / 3)
    assert metrics.harmonic_mean(accuracy) == 0
    assert metrics.harmonic_mean(accuracy[:2]) == pytest.approx(2 / (1 / 0.8 + 1 / 0.5))
    assert metrics.geometric_mean(accuracy) == 0
    assert metrics.geometric_mean(accuracy[:2]) == pytest.approx(math.sqrt(0.8 * 0.5))
    assert metrics.geometric_mean(accuracy[[0, 1, 3]]) == pytest.approx(math.sqrt(0.8 * 0.5))
    assert metrics.worst_class_accuracy(accuracy) == 0
    assert metrics.classes_at_zero(accuracy) == 1


def test_precision_is_of_the_columns() -> None:
    precision = metrics.per_class_precision(CONFUSION)
    assert precision.tolist() == [0.8, 2 / 3, 0, 0]
    assert metrics.per_class_precision(torch.tensor([[1, 0], [1, 0]]))[1].isnan()


def test_groups_at_their_borders() -> None:
    accuracy = torch.tensor([0.8, 0.5, 0.25, 0.1], dtype=torch.float64)
    groups = metrics.group_accuracies(accuracy, COUNTS)
    assert groups == {"many": 0.8, "medium": 0.375, "few": 0.1}
    assert metrics.group_accuracies(accuracy[:1], COUNTS[:1]) == {"many": 0.8, "medium": None, "few": None}


def test_a_group_without_test_samples_has_no_accuracy() -> None:
    assert metrics.group_accuracies(metrics.per_class_accuracy(CONFUSION), COUNTS)["few"] is None


def test_summary_has_every_figure() -> None:
    assert set(metrics.summary(CONFUSION, COUNTS)) == {
        "balanced_accuracy",
        "harmonic_mean",
        "geometric_mean",
        "many",
        "medium",
        "few",
        "worst_class",
        "classes_at_zero",
    }
    with_bins = metrics.summary(CONFUSION, COUNTS, torch.tensor([[2.0, 1.2, 1.0]]))
    assert with_bins["expected_calibration_error"] == pytest.approx(0.1)


def calibration_by_a_loop(logits: torch.Tensor, labels: torch.Tensor, num_bins: int) -> float:
    """Guo et al., eq. 3, a sample at a time."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        exponentials = [math.exp(value - max(row)) for value in row]
        confidence = max(exponentials) / sum(exponentials)
        bin_of = next(m for m in range(1, num_bins + 1) if confidence <= m / num_bins)
        members.setdefault(bin_of, []).append((confidence, row.index(max(row)) == label))
    error = 0.0
    for found in members.values():
        accuracy = sum(right for _, right in found) / len(found)
        error += len(found) / len(labels) * abs(accuracy - sum(confidence for confidence, _ in found) / len(found))
    return error


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_the_calibration_error_is_that_of_a_loop(scale: float, num_bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(500, 7, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(500, generator=generator) < 0.6, logits.argmax(dim=1), 3)
    bins = metrics.reliability(logits.softmax(dim=1), labels, num_bins)
    expected = calibration_by_a_loop(logits, labels, num_bins)
    assert metrics.expected_calibration_error(bins) == pytest.approx(expected, abs=1e-12)
    parts = [
        metrics.reliability(logits[part].softmax(dim=1), labels[part], num_bins)
        for part in (slice(200), slice(200, None))
    ]
    torch.testing.assert_close(parts[0] + parts[1], bins)


def test_bins_are_closed_above() -> None:
    """As in Guo et al.: a confidence of exactly 0.5 is in the lower of two bins, 1 is in the last."""
    probabilities = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    bins = metrics.reliability(probabilities, torch.tensor([0, 1, 1]), 2)
    assert bins.tolist() == [[1.0, 0.5, 1.0], [2.0, 1.75, 1.0]]


def test_without_samples_there_is_no_calibration_error() -> None:
    assert math.isnan(metrics.expected_calibration_error(metrics.reliability(torch.empty(0, 3), torch.empty(0).long())))
