"""Processes that do not call the loss alike are told so, in every one of them, and by the name of what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Processes
from test_distributed import rank_of
from torch import Tensor
from torch.distributed import ProcessGroup

from rcl_fast import contrastive_loss
from rcl_fast.agreement import _digest, _digest_of_bits, _float64_bits

FEATURES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
COUNTS = torch.tensor([90, 10, 2])


def said(group: ProcessGroup, of_each: list[dict[str, Any]]) -> str:
    """What the loss raises in this process, or its value."""
    options: dict[str, Any] = {"class_counts": COUNTS, "rebalance": True, **of_each[rank_of(group)]}
    try:
        return str(contrastive_loss(FEATURES, LABELS, group=group, **options).item())
    except RuntimeError as error:
        return str(error)


def assert_refused(processes: Processes, of_each: list[dict[str, Any]], message: str) -> None:
    for answer in processes.run(len(of_each), said, of_each):
        assert message in answer


def assert_accepted(processes: Processes, of_each: list[dict[str, Any]]) -> None:
    answers = processes.run(len(of_each), said, of_each)
    assert len(set(answers)) == 1
    float(answers[0])


def prototypes(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("odd", [torch.tensor([90, 11, 2]), [90, 11, 2], torch.tensor([90.0, 11.0, 2.0])])
def test_class_counts_that_differ(processes: Processes, odd: Any) -> None:
    of_each: list[dict[str, Any]] = [{}, {}, {"class_counts": odd}]
    assert_refused(processes, of_each, "differ in class_counts: process 0 has 10 for class 1, process 2 has 11")


def test_counts_that_nothing_takes_may_differ(processes: Processes) -> None:
    assert_accepted(processes, [{"rebalance": False}, {"rebalance": False, "class_counts": torch.tensor([1, 2, 3])}])


def test_equal_counts_of_other_dtypes(processes: Processes) -> None:
    assert_accepted(processes, [{}, {"class_counts": [90.0, 10.0, 2.0]}, {"class_counts": COUNTS.to(torch.int16)}])


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (
            [1.0, 0.005, 1.0],
            [1.0, 1.0, 0.005],
            "differ in compression: process 0 has 0.005 for class 1, process 1 has 1.0",
        ),
        ([1.0, 1.0, 1.0], None, "differ in compression: process 0 has given, process 1 has none"),
    ],
)
def test_compression_that_differs(processes: Processes, first: Any, other: Any, message: str) -> None:
    assert_refused(processes, [{"compression": first}, {"compression": other}], message)


def test_a_zero_has_no_sign(processes: Processes) -> None:
    assert_accepted(processes, [{"compression": [0.0, 1.0, 1.0]}, {"compression": [-0.0, 1.0, 1.0]}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prototypes_that_differ(processes: Processes, dtype: torch.dtype) -> None:
    other = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    of_each = [{"prototypes": prototypes(dtype)}, {"prototypes": other}]
    assert_refused(processes, of_each, "differ in prototypes, beyond rounding: process 0 has a checksum of")


@pytest.mark.parametrize("change", ["one row", "two rows change places", "two columns change places", "sign", "scale"])
def test_prototypes_that_differ_in_part(processes: Processes, change: str) -> None:
    other = prototypes()
    if change == "one row":
        other[1] *= 1.001
    elif change == "two rows change places":
        other = other[[1, 0, 2]]
    elif change == "two columns change places":
        other = other[:, [0, 2, 1, 3]]
    else:
        other = -other if change == "sign" else 1.0001 * other
    assert_refused(processes, [{"prototypes": prototypes()}, {"prototypes": other}], "differ in prototypes")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_prototypes_that_differ_by_rounding(processes: Processes, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = 1 + 2 * torch.finfo(dtype).eps * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    other = (prototypes(torch.float64) * noise).to(dtype)
    first = prototypes(torch.float64).to(dtype)
    assert not torch.equal(other, first)
    answers = processes.run(2, said, [{"prototypes": first}, {"prototypes": other}])
    assert all(float(answer) for answer in answers)


def test_a_diverged_run_is_no_disagreement(processes: Processes) -> None:
    nothing = torch.full((3, 4), float("nan"))
    assert processes.run(2, said, [{"prototypes": nothing}] * 2) == ["nan", "nan"]
    assert_refused(processes, [{"prototypes": nothing}, {"prototypes": prototypes()}], "differ in prototypes")


def changed_in_place(group: ProcessGroup) -> list[str]:
    counts = COUNTS.clone()
    answers = [said(group, [{"class_counts": counts}] * 2)]
    if rank_of(group) == 1:
        counts[2] = 3
    return [*answers, said(group, [{"class_counts": counts}] * 2)]


def test_counts_that_change_in_place(processes: Processes) -> None:
    for before, after in processes.run(2, changed_in_place):
        assert float(before)
        assert "process 0 has 2 for class 2, process 1 has 3" in after


def test_a_digest_is_made_once_for_a_tensor_and_a_version() -> None:
    counts = COUNTS.clone()
    first = _digest(counts, counts.device)
    assert _digest(counts, counts.device) is first
    counts[0] += 1
    assert _digest(counts, counts.device) != first
    with torch.inference_mode():
        assert _digest(COUNTS.clone(), counts.device) == first


@pytest.mark.parametrize("places", [(0, 2), (0, 4), (1, 5), (3, 11)])
@pytest.mark.parametrize(("one", "other"), [(0.0, 2.0), (1.0, 2.0), (0.005, 1.0), (2.0, -2.0)])
def test_a_digest_tells_two_numbers_that_change_places(places: tuple[int, int], one: float, other: float) -> None:
    """The bits of small whole numbers are nearly all 0."""
    values = torch.ones(12, dtype=torch.float64)
    values[list(places)] = torch.tensor([one, other], dtype=torch.float64)
    swapped = values.clone()
    swapped[list(places)] = torch.tensor([other, one], dtype=torch.float64)
    assert _digest_of_bits(_float64_bits(values)) != _digest_of_bits(_float64_bits(swapped))


@settings(max_examples=200)
@given(values=st.lists(st.integers(0, 2**40), min_size=1, max_size=30), data=st.data())
def test_a_digest_tells_numbers_and_places_apart(values: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(values) - 1))
    changed = [*values[:place], data.draw(st.integers(0, 2**40)), *values[place + 1 :]]
    other = data.draw(st.one_of(st.permutations(values), st.just(changed)))
    same = _digest_of_bits(_float64_bits(torch.tensor(values))) == _digest_of_bits(_float64_bits(torch.tensor(other)))
    assert bool(same) == (values == other)


@pytest.mark.parametrize("long", [1e6, 1e30])
def test_a_long_prototype_does_not_hide_another(processes: Processes, long: float) -> None:
    first = prototypes()
    first[0] *= long
    other = first.clone()
    other[1] *= -1
    assert_refused(processes, [{"prototypes": first}, {"prototypes": other}], "differ in prototypes")
    assert_accepted(processes, [{"prototypes": first}, {"prototypes": first.clone()}])


def test_prototypes_whose_squares_leave_float64(processes: Processes) -> None:
    first = prototypes(torch.float64) * 1e160
    assert_refused(processes, [{"prototypes": first}, {"prototypes": -first}], "differ in prototypes")


def changed_behind_the_version(group: ProcessGroup) -> str:
    counts = COUNTS.clone() if rank_of(group) == 1 else COUNTS + 1
    said(group, [{"class_counts": counts}] * 2)
    counts.data = COUNTS + 2
    return said(group, [{"class_counts": counts}] * 2)


def test_equal_counts_with_a_digest_of_an_earlier_value(processes: Processes) -> None:
    assert all(float(answer) for answer in processes.run(2, changed_behind_the_version))
