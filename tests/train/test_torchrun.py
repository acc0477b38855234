"""The command that users start: torchrun train/run.py, a process that fails, a restart, a signal."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
OPTIONS = ["--device", "cpu", "--loss", "ce", "--workers", "1", "--loader", "torchvision", "--batch-size", "96"]

# The trainer, but for process 1, which fails once, at its fifth step.
FAILING = """
import os
from rcl_fast.train import run
from rcl_fast.train.loop import engine
from rcl_fast.train.report import results
step, steps = engine.train_step, []
def failing(*arguments):
    steps.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(steps) == 5:
        raise RuntimeError("process 1 is broken")
    return step(*arguments)
engine.train_step = failing
results.write_report = lambda *_: None
run.main()
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


def test_a_process_that_fails_shows_its_traceback_and_a_restart_goes_on_by_itself(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [*TORCHRUN, "--max-restarts", "1", str(script), *OPTIONS, "--epochs", "3", "--checkpoint-minutes", "0"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    assert 'raise RuntimeError("process 1 is broken")' in ran.stderr
    assert re.search(r"going on after epoch 1 and [01] steps?", ran.stdout)
    assert ran.stdout.count("epoch   1/3") == 1  # the main process alone prints
    (folder,) = (tmp_path / "runs").glob("digits_lt-*")
    assert status(folder) == "finished"
    assert json.loads((folder / "metrics.json").read_text())["processes"] == 2


def test_a_signal_to_torchrun_saves_the_run(tmp_path: Path) -> None:
    """With loader processes, which the signal reaches too."""
    folder = tmp_path / "run"
    command = [*TORCHRUN, str(ROOT / "train" / "run.py"), *OPTIONS, "--epochs", "1000", "--output", str(folder)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        for line in started.stdout:
            if line.startswith("epoch   1/"):
                break
        started.send_signal(signal.SIGTERM)
        said = started.stdout.read()
    assert f"go on with --resume {folder}" in said
    assert status(folder) == "preempted"  # before torchrun would have killed it, after 30 s
    assert (folder / "mid_epoch.pt").exists()
    assert started.returncode == 1  # torchrun's, whatever the processes' was: hence status.json
    alone = [sys.executable, str(ROOT / "train" / "run.py"), "--resume", str(folder)]
    ran = subprocess.run(alone, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 1
    assert "processes (was 2, now 1)" in ran.stderr
    assert status(folder) == "preempted"
