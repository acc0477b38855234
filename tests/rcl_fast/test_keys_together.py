"""More keys, the same in every process: N processes give what one does, and keys that differ are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import draw_case
from processes import Processes
from test_agreement import assert_accepted, assert_refused
from test_derivatives import changed_together
from test_distributed import BACKENDS, SIZES, assert_equals_one_process, counted
from torch import Tensor

from rcl_fast.agreement import _digest, _digest_of_bits, _row_bits
from rcl_fast.distributed import bytes_sent

KEYS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
KEY_LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 0])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("anchors_are_keys", [False, True])
@pytest.mark.parametrize("prototypes", [False, True])
def test_loss_and_gradients_are_those_of_one_process(
    processes: Processes, world: int, backend: str, reduction: str, anchors_are_keys: bool, prototypes: bool
) -> None:
    """Uneven local batches, one of them empty."""
    options = {"class_average": True, "rebalance": True, "compression": True, "normalize": prototypes}
    case = draw_case(
        30, 7, keys=25, prototypes=prototypes, anchors_are_keys=anchors_are_keys, temperature=0.5, **options
    )
    assert_equals_one_process(processes, case, SIZES[world], backend=backend, reduction=reduction)


@pytest.mark.parametrize("keys", [0, 9])
@pytest.mark.parametrize("anchors_are_keys", [False, True])
def test_labels_that_nothing_counts(processes: Processes, keys: int, anchors_are_keys: bool) -> None:
    case = draw_case(30, 7, prototypes=False, keys=keys, class_average=True, anchors_are_keys=anchors_are_keys)
    case |= {"class_counts": None, "labels": case["labels"] - 2**62, "key_labels": case["key_labels"] - 2**62}
    assert_equals_one_process(processes, case, [21, 9], backend="tiled", reduction="mean")


def with_keys(keys: Tensor = KEYS, key_labels: Tensor = KEY_LABELS, **options: Any) -> dict[str, Any]:
    return {"keys": keys, "key_labels": key_labels, **options}


def test_keys_that_differ(processes: Processes) -> None:
    other = KEYS.clone()
    other[4, 2], other[6, 1] = 0.25, 9.0
    message = f"differ in keys: process 0 has {KEYS[4, 2].item()} for row 4, column 2, process 2 has 0.25 for it"
    assert_refused(processes, [with_keys(), with_keys(), with_keys(other)], message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [(0.0, 2.0), (1.0, 2.0), (2.0, -2.0), (0.0, -0.0)])
def test_the_digest_tells_numbers_that_change_places(dtype: torch.dtype, numbers: tuple[float, float]) -> None:
    """In a row, in a column, and across; the bits of small whole numbers are nearly all 0."""
    digests = set()
    for places in (((0, 0), (0, 3)), ((0, 3), (0, 0)), ((0, 0), (4, 0)), ((4, 0), (0, 0)), ((4, 3), (0, 0))):
        rows = torch.full((6, 5), 0.5, dtype=dtype)
        for place, number in zip(places, numbers, strict=True):
            rows[place] = number
        digests.add(_digest_of_bits(_row_bits(rows)).item())
    assert len(digests) == 5


def test_rows_that_change_places(processes: Processes) -> None:
    assert_refused(processes, [with_keys(), with_keys(KEYS.flip(0))], "differ in keys: process 0 has ")


def test_key_labels_that_differ(processes: Processes) -> None:
    other = KEY_LABELS.clone()
    other[3] = 0
    message = "differ in key_labels: process 0 has 2 for row 3, process 1 has 0 for it"
    assert_refused(processes, [with_keys(), with_keys(key_labels=other)], message)


def test_labels_that_float64_does_not_tell_apart(processes: Processes) -> None:
    of_each = [with_keys(key_labels=KEY_LABELS + 2**62 + odd, class_counts=None, rebalance=False) for odd in (0, 1)]
    assert_refused(processes, of_each, f"differ in key_labels: process 0 has {2**62} for row 0, process 1 has")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "differ in keys: process 0 has (7, 4, torch.float32), process 1 has None"),
        (
            with_keys(KEYS[:5], KEY_LABELS[:5]),
            "differ in keys: process 0 has (7, 4, torch.float32), process 1 has (5, 4",
        ),
        (with_keys(KEYS.half()), "process 1 has (7, 4, torch.float16)"),
        (with_keys(anchors_are_keys=False), "differ in anchors_are_keys: process 0 has True, process 1 has False"),
    ],
)
def test_calls_that_differ(processes: Processes, other: dict[str, Any], message: str) -> None:
    assert_refused(processes, [with_keys(), other], message)


def test_equal_keys_agree(processes: Processes) -> None:
    diverged = torch.cat([KEYS[:6], torch.full((1, 4), float("nan"))])
    assert_accepted(processes, [with_keys(), with_keys(KEYS.clone(), KEY_LABELS.int()), with_keys()])
    assert_accepted(processes, [with_keys(KEYS[:0], KEY_LABELS[:0])] * 2)
    assert_accepted(processes, [with_keys(diverged)] * 2)


def test_a_digest_is_made_once_for_keys_and_a_version() -> None:
    keys = torch.nn.Parameter(KEYS.clone())
    first = _digest(keys, keys.device, _row_bits)
    assert _digest(keys, keys.device, _row_bits) is first
    with torch.no_grad():
        keys[0] += 1
    assert _digest(keys, keys.device, _row_bits) != first


@pytest.mark.parametrize("name", ["keys", "key_labels"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [5, 40])  # 40: more than anchors and keys, which get other numbers
def test_what_changes_in_place_is_noticed(processes: Processes, name: str, reduction: str, classes: int) -> None:
    case = draw_case(9, 3, classes, keys=6)
    for answer in processes.run(2, changed_together, case, [5, 4], name, {"reduction": reduction}):
        assert "modified by an inplace operation" in answer


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_keys_do_not_travel(processes: Processes, reduction: str) -> None:
    case = draw_case(30, 7, keys=50)
    options = {"reduction": reduction, "backend": "tiled"}
    for sent, names in processes.run(3, counted, case, torch.ones(30), [13, 8, 9], options):
        assert sent == bytes_sent(13, 7, torch.float64, softmax_numbers=2)
        assert names == ["c10d::_allgather_base_"] * 3
