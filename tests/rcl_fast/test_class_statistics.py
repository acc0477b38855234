"""What is counted of a batch: by hand, and how often."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Case, draw_case
from processes import Processes
from test_distributed import local_part, rank_of
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from rcl_fast import contrastive_loss
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.class_statistics import class_statistics, reduction_weights


class Counting(TorchDispatchMode):
    """How often labels were counted, and how often they were sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.histograms = self.sorts = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.histograms += name in ("index_add", "index_add_") and not arguments[0].is_floating_point()
        self.sorts += name == "sort"
        return function(*arguments, **named or {})


def counted(case: Case, **options: Any) -> tuple[int, int]:
    """Returns (histograms, sorts) of one forward and backward pass."""
    with Counting() as counting:
        contrastive_loss(**case, **options).sum().backward()
    return counting.histograms, counting.sorts


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_average", [False, True])
def test_tiled_counts_once(reduction: str, class_average: bool) -> None:
    case = draw_case(class_average=class_average, rebalance=True)
    assert counted(case, backend="tiled", reduction=reduction) == (1, 0)


@pytest.mark.parametrize(("backend", "of_its_losses"), [("dense", 1), ("reference", 0)])
def test_the_whole_matrix_counts_once_more_for_a_mean(backend: str, of_its_losses: int) -> None:
    case = draw_case(class_average=True, rebalance=True)
    assert counted(case, backend=backend, reduction="mean") == (of_its_losses + 1, 0)
    assert counted(case, backend=backend, reduction="none") == (of_its_losses, 0)


def test_labels_are_sorted_once_where_there_are_more_classes_than_anchors_or_nobody_knows_how_many() -> None:
    assert counted(draw_case(5, 4, classes=9), backend="tiled") == (1, 1)
    unknown = draw_case(5, 4, prototypes=False)
    unknown["class_counts"] = None
    assert counted(unknown, backend="tiled") == (1, 1)


def counted_together(group: ProcessGroup, case: Case, sizes: list[int], options: dict[str, Any]) -> tuple[int, int]:
    return counted(local_part(case, sizes, rank_of(group)), group=group, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "times"), [("tiled", 1), ("dense", 3)])  # dense makes its losses anew
def test_several_processes_count_alike(processes: Processes, backend: str, times: int, reduction: str) -> None:
    options = {"backend": backend, "reduction": reduction}
    case = draw_case(30, 4, class_average=True)
    assert processes.run(2, counted_together, case, [21, 9], options) == [(times, 0)] * 2


def batch_of(labels: list[int], **options: Any) -> ContrastiveBatch:
    plain: dict[str, Any] = {"prototypes": None, "class_counts": None, "compression": None, "num_classes": 4}
    plain |= {"temperature": 1.0, "class_average": False, "normalize": True}
    return ContrastiveBatch(**{**plain, "features": torch.eye(len(labels)), "labels": torch.tensor(labels), **options})


def test_by_hand() -> None:
    one = class_statistics(batch_of([2, 0, 2, 2]))
    assert one.classes.tolist() == [2, 0, 2, 2]
    assert one.key_classes.tolist() == []
    assert one.positives.tolist() == [2, 0, 2, 2]
    assert one.log_weights.tolist() == [0, 0, 0, 0]
    assert one.same_class_terms is None

    options = {"prototypes": torch.eye(4), "class_counts": torch.tensor([1, 2, 3, 4]), "class_average": True}
    one = class_statistics(batch_of([2, 0, 2, 2], **options))
    assert one.positives.tolist() == [3, 1, 3, 3]
    expected = torch.tensor([1 / 2, 2 / 1, 3 / 4, 4 / 1]).log()  # images over keys of each class
    torch.testing.assert_close(one.log_weights, expected)
    three_of_four, one_of_two = math.log(4 / 3), math.log(2)
    terms = torch.tensor([three_of_four, one_of_two, three_of_four, three_of_four])
    assert isinstance(one.same_class_terms, Tensor)
    torch.testing.assert_close(one.same_class_terms, terms)


def test_keys_by_hand() -> None:
    keys = {"keys": torch.eye(4)[:3], "key_labels": torch.tensor([2, 3, 3]), "class_average": True}
    one = class_statistics(batch_of([2, 0, 2, 2], **keys))
    assert one.key_classes.tolist() == [2, 3, 3]
    assert one.positives.tolist() == [3, 0, 3, 3]
    torch.testing.assert_close(one.log_weights, torch.tensor([1, 1, 1 / 4, 1 / 2]).log())
    assert isinstance(one.same_class_terms, Tensor)
    torch.testing.assert_close(one.same_class_terms, torch.tensor([4 / 3, 1, 4 / 3, 4 / 3]).log())

    one = class_statistics(batch_of([2, 0, 2, 2], **keys, anchors_are_keys=False))
    assert one.positives.tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(one.log_weights, torch.tensor([1, 1, 1, 1 / 2]).log())
    assert one.same_class_terms is None


def test_keys_have_numbers_below_those_of_anchors_and_keys() -> None:
    one = class_statistics(batch_of([3], keys=torch.eye(2), key_labels=torch.tensor([3, 1])))
    assert [one.classes.tolist(), one.key_classes.tolist()] == [[1], [1, 0]]


def test_more_classes_than_anchors_have_numbers_below_those() -> None:
    assert class_statistics(batch_of([3, 1, 3])).classes.tolist() == [1, 0, 1]


def test_what_a_loss_counts_for() -> None:
    positives = torch.tensor([2, 0, 2, 2])
    assert reduction_weights(positives, "sum").tolist() == [1, 0, 1, 1]
    assert reduction_weights(positives, "mean").tolist() == [1 / 3, 0, 1 / 3, 1 / 3]
    assert reduction_weights(torch.tensor([0]), "mean").tolist() == [0]
