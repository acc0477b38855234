"""Every backend that this machine runs, forward and backward, a group a case: `pytest bench/ --benchmark-only`.

On a CPU small cases, on a GPU those of bench/loss/gpu.py. That script and cpu.py interleave the rounds and say more of
each figure (share of the limit, memory, CUDA graphs, published code); here --benchmark-compare sets a run
against an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.loss.cases import Case, available_backends, draw, ours, run, synchronize
from bench.loss.gpu import CASES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The reference is a Python loop over anchors and keys: only where it ends soon.
TINY = Case("tiny", 32, 20, 32)
CPU_CASES = (TINY, Case("CIFAR batch", 512, 100, 128), Case("ImageNet-LT batch", 512, 1000, 1024))
GPU_CASES = (TINY, *(case for case in CASES if case.anchors <= 16384))


def pairs() -> Iterator[tuple[Case, str]]:
    """Gives the backends of a case one after the other, as near to interleaving as pytest-benchmark comes."""
    for case in GPU_CASES if DEVICE.type == "cuda" else CPU_CASES:
        for backend in (*available_backends(DEVICE), *(("reference",) if case == TINY else ())):
            yield case, backend


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(*pair, id=f"{pair[1]}-{pair[0].name}", marks=pytest.mark.benchmark(group=str(pair[0])))
        for pair in pairs()
    ],
)
def test_forward_and_backward(case: Case, backend: str, benchmark: Any) -> None:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    inputs, loss = draw(case, DEVICE, dtype), ours(backend)

    def call() -> None:
        run(loss, inputs)
        synchronize(DEVICE)

    benchmark.pedantic(call, warmup_rounds=2, rounds=10)
