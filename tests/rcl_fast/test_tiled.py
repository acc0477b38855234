"""What the tiled backend promises on top of the right numbers: memory and determinism."""

import pytest
import torch
from cases import draw_case

from rcl_fast import contrastive_loss
from rcl_fast.backends import tiled


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_size_n_by_m_is_saved_for_backward(reduction: str) -> None:
    n, dimensions, classes = 400, 4, 9
    case = draw_case(n, dimensions, classes, class_average=True, rebalance=True)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive_loss(**case, reduction=reduction, backend="tiled").sum().backward()
    assert saved
    assert max(saved) <= (n + classes) * dimensions


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_temporary_is_larger_than_the_chunk(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_bytes = 100_000  # one matrix of 500 x 509 float64 would take 2,036,000
    monkeypatch.setitem(tiled.CHUNK_BYTES, "cpu", chunk_bytes)
    case = draw_case(500, 4, 9, class_average=True, rebalance=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        contrastive_loss(**case, reduction=reduction, backend="tiled").sum().backward()
    allocations = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocations) > chunk_bytes / 4  # the chunk is really used
    assert max(allocations) <= chunk_bytes


def test_the_same_bits_every_run() -> None:
    case = draw_case(200, 16, class_average=True, rebalance=True).to(torch.float32)
    runs = []
    for _ in range(3):
        again = case.to(torch.float32)
        loss = contrastive_loss(**again, backend="tiled")
        loss.backward()
        runs.append([loss.detach(), *again.gradients()])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
