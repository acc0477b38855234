"""Accuracies on confusion matrices small enough to work by hand."""

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
    assert metrics.worst_class_accuracy(accuracy) == 0
    assert metrics.classes_at_zero(accuracy) == 1


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
        "many",
        "medium",
        "few",
        "worst_class",
        "classes_at_zero",
    }
