"""How many threads a run takes, by affinity, quota, processes and OMP_NUM_THREADS; cgroups are files here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcl_fast.train.runtime import threads
from rcl_fast.train.runtime.threads import share_cpus, usable_cpus


def usable(tmp_path: Path, membership: str, quotas: dict[str, str]) -> int:
    """With these files below a cgroup folder: {path: text}."""
    for path, text in quotas.items():
        file = tmp_path / "cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "membership").write_text(membership)
    return usable_cpus(tmp_path / "cgroup", tmp_path / "membership")


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def test_the_affinity_without_cgroups(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, tmp_path / "missing") == 16


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("400000 100000\n", 4),
        ("max 100000\n", 16),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("9900000 100000", 16),
    ],
)
def test_version_2(tmp_path: Path, given: str, expected: int) -> None:
    assert usable(tmp_path, "0::/\n", {"cpu.max": given}) == expected


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    quotas = {"a/b/cpu.max": "800000 100000", "a/cpu.max": "300000 100000", "other/cpu.max": "100000 100000"}
    assert usable(tmp_path, "0::/a/b\n", quotas) == 3


def test_version_1(tmp_path: Path) -> None:
    quota, period = (f"cpu,cpuacct/job/cpu.cfs_{name}_us" for name in ("quota", "period"))
    assert usable(tmp_path, "5:memory:/job\n4:cpu,cpuacct:/job\n", {quota: "600000", period: "100000"}) == 6
    assert usable(tmp_path, "4:cpu,cpuacct:/job\n", {quota: "-1\n", period: "100000\n"}) == 16


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What PyTorch is told, which has 8 threads here."""
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return told


@pytest.mark.parametrize(("cpus", "processes", "expected"), [(3, 1, [3]), (16, 1, []), (16, 4, [4]), (2, 4, [1])])
def test_processes_share(
    cpus: int, processes: int, expected: list[int], set_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: cpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    share_cpus()
    assert set_to == expected


def test_the_users_number_goes_first(set_to: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    share_cpus()
    assert not set_to


SAYS_ITS_POLICY = """
import importlib, os, sys
sys.modules["torch"] = None  # the command ends where it would load PyTorch
command = importlib.import_module(f"rcl_fast.train.{sys.argv[1]}")
before = os.environ.get("OMP_WAIT_POLICY")
try:
    command.main(sys.argv[2:])
except ImportError:
    print(before, os.environ.get("OMP_WAIT_POLICY"))
"""

COMMANDS = {
    "run": [],
    "verify": ["--dataset", "digits_lt"],
    "second_stage": ["--run", "runs/NAME", "--method", "crt"],
    "sweep": ["--dataset", "digits_lt", "--study", "runs/study", "--grid", "tau=1"],
    "reproduce": ["table1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_waits_passively_and_an_import_changes_nothing(command: str) -> None:
    """Started as a file or installed: all that is imported until the command runs does without PyTorch."""
    assert policies(command, {}) == ["None", "PASSIVE"]


def test_the_users_policy_goes_first() -> None:
    assert policies("run", {"OMP_WAIT_POLICY": "ACTIVE"}) == ["ACTIVE", "ACTIVE"]


def policies(command: str, given: dict[str, str]) -> list[str]:
    """Before the command ran, and when it loaded PyTorch."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    started = [sys.executable, "-c", SAYS_ITS_POLICY, command, *COMMANDS[command]]
    return subprocess.run(
        started, env=environment, capture_output=True, text=True, check=True, timeout=1200
    ).stdout.split()
