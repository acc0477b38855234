"""bench/loss/gpu.py: no figure comes from a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.loss import cases
from bench.loss import gpu as gpu_loss

CASE = cases.Case("tiny", 32, 11, 64)
RIGHT = cases.ours("tiled")


def drawn(dtype: torch.dtype) -> Any:
    return cases.draw(CASE, torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_loss_is_within_rounding(dtype: torch.dtype) -> None:
    assert gpu_loss.check("dense", cases.ours("dense"), CASE, drawn(dtype)).keys() == {
        "gradient_error",
        "loss_error_units",
    }


def scaled(inputs: Any) -> Tensor:
    return 1.01 * RIGHT(inputs)


def shifted(inputs: Any) -> Tensor:
    return RIGHT(inputs) + 1e-3


def without_a_row(inputs: Any) -> Tensor:
    hidden = torch.cat([inputs.features[:-2], inputs.features[-2:].detach()])
    return RIGHT(inputs._replace(features=hidden))


def with_a_nan(inputs: Any) -> Tensor:
    total = RIGHT(inputs)
    total.register_hook(lambda grad_output: grad_output * float("nan"))
    return total


@pytest.mark.parametrize("wrong", [scaled, shifted, without_a_row, with_a_nan])
def test_a_wrong_loss_is_refused(wrong: Callable[[Any], Tensor]) -> None:
    with pytest.raises(ArithmeticError, match="wrong"):
        gpu_loss.check("triton", wrong, CASE, drawn(torch.bfloat16))


def test_a_loss_that_does_not_differentiate_the_prototypes_is_refused() -> None:
    def frozen(inputs: Any) -> Tensor:
        return RIGHT(inputs._replace(prototypes=inputs.prototypes.detach()))

    with pytest.raises(RuntimeError, match="not have been used"):
        gpu_loss.check("triton", frozen, CASE, drawn(torch.bfloat16))


def test_a_nan_is_no_rounding() -> None:
    assert not gpu_loss.Errors(float("nan"), 0.0).are_rounding(torch.float32)
    assert not gpu_loss.Errors(0.0, float("nan")).are_rounding(torch.float32)
