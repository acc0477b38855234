"""The kernels with the tiles that users get, at sizes that choose the large and the small one of each entry.

python tests/kernels/shipped.py        on a GPU, where there is no pytest
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from batches import assert_as_exact_as_plain, plain, random_batch, truncated
from torch import Tensor

from rcl_fast.backends import dense
from rcl_fast.batch import ContrastiveBatch
from rcl_fast.kernels import block_sizes


class Shipped(NamedTuple):
    """A batch, and the precision of its products."""

    N: int
    C: int
    D: int
    dtype: torch.dtype
    precision: str  # of torch.set_float32_matmul_precision
    compressed: bool  # no bound on the similarities is known then
    extra_keys: int | None = None
    anchors_are_keys: bool = True

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        keys = "" if self.extra_keys is None else f"-{self.extra_keys} keys{' alone' * (not self.anchors_are_keys)}"
        return f"{self.N}-{self.C}-{self.D}-{name}-{self.precision}{'-compressed' * self.compressed}{keys}"


def gpu_cases() -> Iterator[Shipped]:
    """Each kind of product, each width of the table and beyond, ragged and not, small tile and large."""
    products = (
        (torch.bfloat16, "highest"),
        (torch.float16, "highest"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
    )
    for dtype, precision in products:
        for position, D in enumerate((8, 64, 100, 128, 200, 256, 320, 1024, 2048)):
            compressed = position % 2 == 0
            yield Shipped(200, 150, D, dtype, precision, compressed)
            yield Shipped(2300, 517, D, dtype, precision, not compressed)
    yield Shipped(5000, 2, 64, torch.bfloat16, "highest", False)  # labels counted by a histogram
    for position, D in enumerate((64, 128, 256, 1024)):
        yield Shipped(600, 150, D, torch.bfloat16, "highest", position % 2 == 0, 5000, position < 2)
        yield Shipped(200, 150, D, torch.float32, "highest", position % 2 == 1, 300, position >= 2)
    yield Shipped(30, 20_000, 64, torch.bfloat16, "highest", False)  # many times more classes than anchors


INTERPRETED_CASES = (
    Shipped(150, 120, 100, torch.bfloat16, "highest", False, 140),
    Shipped(130, 100, 300, torch.float32, "highest", True),
)


def check(case: Shipped, device: torch.device) -> None:
    """Against float64, no worse than plain PyTorch in the same dtype and precision, or than TF32 has to be."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        keys = {"extra_keys": case.extra_keys, "anchors_are_keys": case.anchors_are_keys}
        batch = random_batch(device, case.N, case.C, case.D, dtype=case.dtype, compressed=case.compressed, **keys)
        assert_as_exact_as_plain(batch, truth=in_float64, yardsticks=yardsticks(case.dtype, device))
    finally:
        torch.set_float32_matmul_precision(before)


def yardsticks(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[ContrastiveBatch], Tensor], ...]:
    """For products of this dtype at the current precision; on a CPU none is TF32's, as the interpreter cuts nothing."""
    if device.type == "cuda" and block_sizes.math_mode_of(dtype, block_sizes.processor(device).arch) == "tf32":
        return plain, truncated
    return (plain,)


def in_float64(batch: ContrastiveBatch) -> Tensor:
    """`dense`, as the reference's loops would take minutes; both are held to each other by other tests."""
    rows = {name: getattr(batch, name) for name in ("features", "keys", "prototypes")}
    return dense.losses(batch._replace(**{name: one.double() for name, one in rows.items() if one is not None}))


def main() -> int:
    cases = list(gpu_cases())
    failed = 0
    for case in cases:
        try:
            check(case, torch.device("cuda"))
        except AssertionError as error:
            failed += 1
            print(f"{case}: {error}", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} shipped configurations as exact as plain PyTorch")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
