"""How many threads this process may keep busy: what its affinity and its container's quota allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Returns the number of CPUs of this process's affinity, limited by the quotas of its cgroups; at least 1.

    Args:
        cgroups, membership: where Linux shows them; other systems have neither, and no quota.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([there, *(int(quota) for quota in _quotas(cgroups, membership))]))


def share_cpus() -> None:
    """Limits PyTorch's threads to `usable_cpus`, shared by this machine's processes, unless OMP_NUM_THREADS is set.

    PyTorch's own number respects the affinity and the cores, so it is only ever made smaller.
    """
    if "OMP_NUM_THREADS" in os.environ:  # torchrun sets it, too
        return
    allowed = max(1, usable_cpus() // processes_here())
    if allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)


def processes_here() -> int:
    """Returns how many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """Gives the quotas, in CPUs, of this process's cgroup and those above it, in either version of cgroups."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            yield from _quotas_above(cgroups, path, _unified)
        elif "cpu" in controllers.split(","):
            for folder in (controllers, "cpu"):
                yield from _quotas_above(cgroups / folder, path, _version_1)


def _quotas_above(root: Path, path: str, read: Callable[[Path], tuple[int, int]]) -> Iterator[float]:
    own = root / path.lstrip("/")
    for folder in (own, *own.parents[: len(own.relative_to(root).parts)]):
        try:
            quota, period = read(folder)
        except (OSError, ValueError):  # no such file, or "max", which is no quota
            continue
        if quota > 0:
            yield quota / period


def _unified(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    return int(quota), int(period)


def _version_1(folder: Path) -> tuple[int, int]:
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quota, period = ((folder / name).read_text(encoding="utf-8") for name in names)
    return int(quota), int(period)
