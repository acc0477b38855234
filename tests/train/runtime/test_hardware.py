"""Device and precision, also those of machines that are not at hand."""

import pytest
import torch

from rcl_fast.train.errors import UserError
from rcl_fast.train.options import RunOptions
from rcl_fast.train.runtime.hardware import choose_runtime


@pytest.mark.parametrize(
    ("capability", "precision", "scales"),
    [((7, 0), "fp16", True), ((7, 5), "fp16", True), ((8, 0), "bf16", False), ((9, 0), "bf16", False)],
)
def test_a_gpu_gets_bf16_only_where_it_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, scales: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime = choose_runtime(RunOptions())
    assert (runtime.device.type, runtime.precision) == ("cuda", precision)
    assert runtime.grad_scaler().is_enabled() == scales


def test_a_cpu_gets_fp32_and_obeys_otherwise() -> None:
    assert choose_runtime(RunOptions(device="cpu")).precision == "fp32"
    runtime = choose_runtime(RunOptions(device="cpu", precision="bf16"))
    with runtime.autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with choose_runtime(RunOptions(device="cpu")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(("name", "said"), [("gpu", "--device gpu"), ("cuda:63", "CUDA devices")])
def test_a_device_that_is_not_there_is_named(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_runtime(RunOptions(device=name))


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_runtime(RunOptions()).device == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:0 is one GPU for several processes"):
        choose_runtime(RunOptions(device="cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, it shows 2: --nproc-per-node 2"):
        choose_runtime(RunOptions())
