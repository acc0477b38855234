"""A run of commit 6b8c554, stopped within its second epoch, goes on with the code of now."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rcl_fast.train.inference import load_run

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "data" / "run_of_6b8c554"
EXPECTED = json.loads((OLD / "expected.json").read_text())  # with how the run was made
TIMINGS = {"images_per_second", "waiting_for_data"}

# With these the run ends in the same bits on every x86-64 CPU; it was made with them too. Only MKL's square roots may
# still differ in the last bit, and this run rounds its own to whole pixels.
SAME_BITS = {
    "ATEN_CPU_CAPABILITY": "default",  # PyTorch's own kernels: with SSE2, not with what the CPU has
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # convolutions: the least that they have
    "MKL_CBWR": "COMPATIBLE",  # matrix products, exp, log, ...: one path, SSE2's, for Intel and AMD
    "OMP_NUM_THREADS": "1",  # each thread sums a part
    "MKL_NUM_THREADS": "1",  # the same: where it is set, it goes before OMP_NUM_THREADS
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",  # the C library's exp, cos, ...: without FMA
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old run's folder, once the command line has gone on with it to the end."""
    folder = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("expected.json"))
    command = [sys.executable, str(ROOT / "train" / "run.py"), "--resume", str(folder)]
    ran = subprocess.run(command, env={**os.environ, **SAME_BITS}, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def other_bits() -> str | None:
    """Why the bits are other ones here; None where they are the same."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the bits are those of x86-64 Linux, not of {sys.platform} on {platform.machine()}"
    made_with = EXPECTED["versions"]["torch"]
    return None if torch.__version__ == made_with else f"the bits are those of PyTorch {made_with}"


@pytest.mark.skipif(other_bits() is not None, reason=str(other_bits()))
def test_it_ends_in_the_same_bits_and_figures(resumed: Path) -> None:
    assert digest(torch.load(resumed / "last.pt", weights_only=True)) == EXPECTED["sha256"]
    assert without_timings(json.loads((resumed / "metrics.json").read_text())) == EXPECTED["metrics.json"]
    assert [without_timings(row) for row in history(resumed)] == EXPECTED["metrics.jsonl"]


def test_it_reports(resumed: Path) -> None:
    assert json.loads((resumed / "status.json").read_text())["status"] == "finished"
    assert "digits_lt · bcl_rcl · resnet32" in (resumed / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((resumed / "metrics.json").read_text())
    assert metrics.keys() >= EXPECTED["metrics.json"].keys() | TIMINGS
    assert metrics["last_epoch"] == 2
    assert history(resumed)[0] == history(OLD)[0]
    assert [row["epoch"] for row in history(resumed)] == [1, 2]


def test_it_loads(resumed: Path) -> None:
    """What it has become, and the weights that it was stopped with."""
    assert logits(resumed, "best.pt").isfinite().all()
    shutil.copy(OLD / "mid_epoch.pt", resumed)
    expected = torch.tensor(EXPECTED["logits of mid_epoch.pt"])
    torch.testing.assert_close(logits(resumed, "mid_epoch.pt"), expected, rtol=1e-4, atol=1e-4)
    assert load_run(resumed).class_names == [str(digit) for digit in range(10)]


def logits(folder: Path, checkpoint: str) -> torch.Tensor:
    """[10] of an image that gets brighter to the right and below."""
    model, view, _ = load_run(folder, checkpoint)
    pixels = np.add.outer(np.arange(8), np.arange(8)).astype(np.uint8) * 18
    with torch.no_grad():
        return model.classifier(model.backbone(view(Image.fromarray(pixels).convert("RGB"))[None]))[0]


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in TIMINGS}


def digest(state: dict[str, Any]) -> str:
    """SHA-256 of every tensor in a checkpoint: its place, type, shape and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in tensors(state, ""):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def tensors(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """By name, in the order of the names; without NumPy's random state, which nothing seeds here."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return []
    parts = [(f"{name}/{key}", part) for key, part in value.items() if key != "numpy"]
    return [found for place, part in sorted(parts, key=lambda part: part[0]) for found in tensors(part, place)]
