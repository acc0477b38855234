"""The kernels in several processes, from the public call to the gradients."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

sys.path.append(str(Path(__file__).parents[1] / "rcl_fast"))

from cases import Case, draw_case
from processes import Processes
from test_distributed import in_a_process, losses_and_gradients, together

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these processes share the CPU: kernels run there under the interpreter alone"
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("kernels"))
    yield started
    started.stop()


def interpreted(group: ProcessGroup, case: Case, grad_output: Tensor, sizes: list[int], options: dict) -> list[Tensor]:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import interpreter

    if "rcl_fast.kernels" not in sys.modules:
        interpreter.repair()
    return in_a_process(group, case, grad_output, sizes, 10**6, {**options, "backend": "triton"})


@pytest.mark.parametrize("sizes", [[21, 9], [13, 0, 17]], ids=str)
@pytest.mark.parametrize(("reduction", "prototypes"), [("mean", True), ("mean", False), ("none", True)])
def test_error_is_that_of_plain_pytorch(pool: Processes, sizes: list[int], reduction: str, prototypes: bool) -> None:
    case = draw_case(30, 24, prototypes=prototypes, class_average=prototypes, rebalance=True)
    assert_as_exact_as_plain(pool, case, sizes, reduction)


@pytest.mark.parametrize(("sizes", "anchors_are_keys"), [([21, 9], False), ([13, 0, 17], True)], ids=str)
def test_extra_keys(pool: Processes, sizes: list[int], anchors_are_keys: bool) -> None:
    case = draw_case(30, 24, keys=19, class_average=True, rebalance=True, anchors_are_keys=anchors_are_keys)
    assert_as_exact_as_plain(pool, case, sizes, "mean")


def assert_as_exact_as_plain(pool: Processes, case: Case, sizes: list[int], reduction: str) -> None:
    options: dict[str, Any] = {"reduction": reduction}
    case = case.to(torch.float32)
    grad_output = torch.linspace(-1, 2, 30, dtype=torch.float64)
    exact = losses_and_gradients(case.to(torch.float64), grad_output, backend="reference", **options)
    plain = losses_and_gradients(case.to(torch.float64).to(torch.float32), grad_output, backend="dense", **options)
    ours = together(pool.run(len(sizes), interpreted, case, grad_output, sizes, options), reduction)
    # The loss is a difference of logits of up to 1/T and of log n, each rounded; a gradient is a sum of its own size.
    magnitudes = [10 + 7.0, *(gradient.abs().max() for gradient in exact[1:])]
    for truth, by_plain, by_ours, magnitude in zip(exact, plain, ours, magnitudes, strict=True):
        rounding = 16 * torch.finfo(torch.float32).eps * magnitude
        assert (by_ours - truth).abs().max() <= 2 * (by_plain - truth).abs().max() + rounding
