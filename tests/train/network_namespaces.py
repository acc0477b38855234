"""Two nodes on one machine, for test_two_nodes.py: network namespaces that one virtual cable joins.

They share everything else: the disk, the host's name and the numbers of processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

LONGEST = 900  # seconds for anything awaited: a machine may be busy, but no test waits for ever
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Agent:
    """A node's torchrun, and the file that it and its worker print to."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def worker(self) -> int | None:
        """The number of its worker process; None where there is none yet."""
        number = self.process.pid
        with suppress(OSError):
            for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
                if b"run.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        return None

    def kill(self) -> None:
        """Kills torchrun alone, as the system does where memory ends."""
        self.process.kill()
        self.process.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun goes on and on: {self.said}") from None


@dataclass(frozen=True)
class Node:
    """A network namespace, its end of the cable, and its address there."""

    namespace: str
    interface: str
    address: str

    def torchrun(self, first: Node, options: list[str], output: Path) -> Agent:
        """Starts torchrun for one process of two, as docs/distributed.md has it."""
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--nproc-per-node", "1", "--monitor-interval", "0.1", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{first.address}:29500", "--local-addr", self.address]
        command += ["--rdzv-conf", "is_host=1"] if self == first else []
        # Else gloo takes the address of the host's name, which both nodes share.
        environment = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": self.interface}
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, *options], cwd=output.parent, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        return Agent(process, output)

    def processes(self) -> list[int]:
        """The numbers of all processes in the namespace."""
        return [int(number) for number in _ip("netns", "pids", self.namespace).stdout.split()]

    def kill_all(self) -> None:
        """Kills whatever runs in the namespace, orphans included."""
        deadline = time.monotonic() + 60
        while (numbers := self.processes()) and time.monotonic() < deadline:
            for number in numbers:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that see each other; skips the test where this machine makes no namespaces."""
    one, other = (Node(f"rcl_fast-{os.getpid()}-{n}", f"cable{n}", f"10.213.7.{n}") for n in (1, 2))
    try:
        _lay_cable(one, other)
        yield one, other
    finally:
        for node in (one, other):
            node.kill_all()
            _ip("netns", "delete", node.namespace)


def _lay_cable(one: Node, other: Node) -> None:
    for node in (one, other):
        _need("netns", "add", node.namespace)
    cable = ["link", "add", one.interface, "netns", one.namespace, "type", "veth"]
    _need(*cable, "peer", "name", other.interface, "netns", other.namespace)
    for node in (one, other):
        within = ("-netns", node.namespace)
        _need(*within, "address", "add", f"{node.address}/24", "dev", node.interface)
        _need(*within, "link", "set", node.interface, "up")
        _need(*within, "link", "set", "lo", "up")


def _need(*arguments: str) -> None:
    made = _ip(*arguments)
    if made.returncode != 0:
        pytest.skip(f"two nodes need network namespaces, and `ip {' '.join(arguments)}` says: {made.stderr.strip()}")


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:  # no such program
        return subprocess.CompletedProcess(["ip"], 127, "", str(error))


def wait_until(true: Callable[[], bool], *agents: Agent) -> None:
    """Fails, with what the agents said, where it never becomes true."""
    deadline = time.monotonic() + LONGEST
    while not true():
        assert time.monotonic() < deadline, "\n".join(agent.said for agent in agents)
        time.sleep(0.05)
