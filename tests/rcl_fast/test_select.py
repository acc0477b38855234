"""Which backend "auto" stands for."""

import subprocess
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

import rcl_fast
from rcl_fast.backends import explain, select, triton


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton_version: str = "3.3.1") -> None:
    """A GPU of that generation and a Triton, as far as the choice looks."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(explain, "_triton_version", lambda: TorchVersion(triton_version))


GENERATIONS = {
    (7, 0): "tiled",
    (7, 5): "tiled",
    (8, 0): "triton",
    (8, 9): "triton",
    (9, 0): "triton",
    (10, 0): "triton",
    (12, 0): "triton",
}


@pytest.mark.parametrize(("capability", "backend"), GENERATIONS.items())
def test_the_kernels_from_sm_80_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str) -> None:
    pretend(monkeypatch, capability)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        chosen = rcl_fast.explain_backend("cuda", dtype)
        assert chosen.backend == backend
        assert f"sm_{capability[0]}{capability[1]}" in str(chosen)
    assert rcl_fast.explain_backend().backend == backend  # the GPU where there is one


def test_the_first_triton_of_pytorch_2_7_has_no_products_for_the_newest_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (12, 0), "3.3.0")
    assert "sm_120, and Triton before 3.3.1 makes no products" in rcl_fast.explain_backend("cuda").reason
    assert rcl_fast.explain_backend("cuda").backend == "tiled"
    pretend(monkeypatch, (10, 0), "3.3.0")
    assert rcl_fast.explain_backend("cuda").backend == "triton"


def test_float64_the_cpu_and_other_devices_take_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    for arguments, reason in [
        (("cuda", torch.float64), "float64"),
        (("cpu",), "on the CPU"),
        (("xpu", torch.bfloat16), 'not been tried on xpu; backend="triton" runs them there'),
        (("mps",), "not been tried on mps"),
    ]:
        chosen = rcl_fast.explain_backend(*arguments)
        assert chosen.backend == "tiled"
        assert reason in chosen.reason


def test_rocm_calls_its_devices_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert str(rcl_fast.explain_backend("cuda")).startswith("tiled: the kernels have not been tried on ROCm")


def test_without_triton_there_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(explain, "find_spec", lambda name: None)
    assert str(rcl_fast.explain_backend("cuda")) == "tiled: Triton is not installed"


@pytest.mark.parametrize("prototypes", [None, torch.float32, torch.float64], ids=str)
def test_the_loss_takes_what_auto_chooses(monkeypatch: pytest.MonkeyPatch, prototypes: torch.dtype | None) -> None:
    """Also for prototypes of a wider dtype than the features'."""
    asked = []
    monkeypatch.setattr(select, "automatic", lambda device, dtype: asked.append((device.type, dtype)) or "triton")
    monkeypatch.setattr(triton, "total", lambda batch, reduction: torch.tensor(7.0))
    rows = None if prototypes is None else torch.eye(3, dtype=prototypes)
    assert rcl_fast.contrastive_loss(torch.eye(3, dtype=torch.bfloat16), torch.arange(3), prototypes=rows) == 7
    assert asked == [("cpu", torch.promote_types(torch.bfloat16, prototypes or torch.bfloat16))]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'triton', 'tiled'"):
        rcl_fast.contrastive_loss(torch.eye(3), torch.arange(3), backend="cuda")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import rcl_fast
features, labels = torch.eye(4), torch.arange(4) % 2
assert rcl_fast.contrastive_loss(features, labels) > 0
try:
    rcl_fast.contrastive_loss(features, labels, backend="triton")
except ImportError:
    print("refused")
"""


def test_the_library_works_without_triton() -> None:
    """Not every platform has it; only the triton backend needs it."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr
