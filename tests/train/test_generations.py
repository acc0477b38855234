"""What each generation of cards gets, all choices together: the table of docs/hardware.md, all of the V100's row."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rcl_fast
from rcl_fast.train.options import RunOptions
from rcl_fast.train.runtime.hardware import choose_runtime

ROOT = Path(__file__).parents[2]


class Row(NamedTuple):
    """A row of that table; generation: (7, 0) for sm_70, None for a CPU."""

    generation: tuple[int, int] | None
    precision: str
    backend: str
    wheels: str


def rows() -> list[Row]:
    found = []
    document = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    section = document.split("## Which card gets what")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and (match := re.fullmatch(r"sm_(\d+)(\d)|–", cells[1])):
            generation = (int(match[1]), int(match[2])) if match[1] else None
            found.append(Row(generation, cells[2].split(",")[0], cells[3].strip("`"), cells[4]))
    return found


ROWS = rows()


def pretend(monkeypatch: pytest.MonkeyPatch, generation: tuple[int, int]) -> None:
    """A GPU of that generation, as far as the choices look."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: generation)
    # PyTorch says so of every generation: it emulates bf16 before sm_80.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_the_table_is_there() -> None:
    assert [row.generation for row in ROWS] == [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_table_says_what_the_code_chooses(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    if row.generation is None:
        device = torch.device("cpu")
    else:
        pretend(monkeypatch, row.generation)
        device = torch.device("cuda")
    runtime = choose_runtime(RunOptions(device=device.type))
    assert runtime.precision == row.precision
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert rcl_fast.explain_backend(device, dtype).backend == row.backend


def test_all_that_a_v100_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 0))
    assert torch.cuda.is_bf16_supported()
    runtime = choose_runtime(RunOptions())
    assert (runtime.device.type, runtime.precision) == ("cuda", "fp16")
    assert runtime.grad_scaler().is_enabled()
    with runtime.autocast():
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == torch.float16
    for dtype in (torch.float16, torch.float32):
        backend, reason = rcl_fast.explain_backend("cuda", dtype)
        assert backend == "tiled"
        assert "sm_70" in reason
        assert "tensor cores from sm_80 on" in reason


def built_for() -> list[tuple[int, int]]:
    """The generations that this PyTorch has machine code for; known without a GPU."""
    flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
    return [(int(arch[3:-1]), int(arch[-1])) for arch in (flags or "").split() if re.fullmatch(r"sm_\d+", arch)]


def is_locked() -> bool:
    """Whether this PyTorch is the lock's, from PyPI."""
    version = torch.__version__.split("+")[0]
    return f"\ntorch=={version}\n" in (ROOT / "requirements.lock").read_text(encoding="utf-8") and bool(built_for())


@pytest.mark.skipif(not is_locked(), reason="another PyTorch than the lock's")
def test_the_lock_has_machine_code_for_every_row() -> None:
    """Code for one generation runs on the later ones of its major number."""
    for row in ROWS:
        if row.generation is not None:
            major, minor = row.generation
            assert any(built[0] == major and built[1] <= minor for built in built_for()), row
    assert (7, 0) in built_for()


@pytest.mark.skipif(int((torch.version.cuda or "0").split(".")[0]) < 13, reason="a PyTorch before CUDA 13")
def test_newer_builds_leave_the_v100_out() -> None:
    assert min(built_for()) == (7, 5)
    assert [row.generation for row in ROWS if row.wheels.startswith("the lock alone")] == [(7, 0)]
