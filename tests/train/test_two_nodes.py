"""Two nodes under torchrun, as network namespaces of this machine: what remains where a worker or an agent is killed.

What is said of several nodes in docs/distributed.md.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from network_namespaces import ENVIRONMENT, LONGEST, Agent, Node, two_nodes, wait_until

from rcl_fast.train.rundir import checkpoints

pytestmark = pytest.mark.slow

RUN = str(Path(__file__).parents[2] / "train" / "run.py")
# BCL+RCL, whose loss takes the features of both nodes.
OPTIONS = ["--device", "cpu", "--loader", "torchvision", "--workers", "1", "--batch-size", "96", "--lr", "0.02"]
OPTIONS += ["--epochs", "6", "--checkpoint-minutes", "0"]
TIMINGS = {"images_per_second", "waiting_for_data"}

Nodes = tuple[Node, Node]
Agents = tuple[Agent, Agent]


@pytest.fixture(scope="module")
def cable() -> Iterator[Nodes]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(cable: Nodes) -> Iterator[Nodes]:
    yield cable
    for node in cable:
        node.kill_all()


def start(nodes: Nodes, folder: Path, name: str, *arguments: str, restarts: int = 0) -> Agents:
    """torchrun on both nodes, whose output goes to files beside the folder of results."""
    options = ["--rdzv-id", name, "--max-restarts", str(restarts), RUN, *arguments]
    first, second = (
        node.torchrun(nodes[0], options, folder.with_name(f"{folder.name}, {name}, node {number}"))
        for number, node in enumerate(nodes, start=1)
    )
    return first, second


def begin(nodes: Nodes, folder: Path, restarts: int = 0) -> Agents:
    """A run that has made an epoch."""
    agents = start(nodes, folder, "begun", *OPTIONS, "--output", str(folder), restarts=restarts)
    wait_until(lambda: "epoch   1/" in agents[0].said, *agents)
    return agents


def resume(nodes: Nodes, folder: Path) -> list[int]:
    return [agent.wait() for agent in start(nodes, folder, "resumed", "--resume", str(folder))]


def kill_worker(agent: Agent) -> None:
    worker = agent.worker()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)


def wait_until_nothing_runs(nodes: Nodes, *agents: Agent) -> None:
    wait_until(lambda: not any(node.processes() for node in nodes), *agents)


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


def end_of(folder: Path) -> dict[str, Any]:
    last = checkpoints.load(folder / checkpoints.LAST)
    history = [{key: value for key, value in row.items() if key not in TIMINGS} for row in last["history"]]
    return {"history": history, "weights": last["model"]}


def assert_same_end(folder: Path, other: Path) -> None:
    assert status(folder) == "finished"
    one, two = end_of(folder), end_of(other)
    assert one["history"] == two["history"]
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, two["weights"][name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops: two processes of one node."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", RUN, *OPTIONS]
    subprocess.run(
        [*command, "--output", str(folder)],
        cwd=folder.parent,
        env={**os.environ, **ENVIRONMENT},
        check=True,
        timeout=LONGEST,
    )
    return folder


def test_two_nodes_train_as_two_processes_of_one_node_do(nodes: Nodes, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agents = start(nodes, folder, "whole", *OPTIONS, "--output", str(folder))
    assert [agent.wait() for agent in agents] == [0, 0], "\n".join(agent.said for agent in agents)
    assert agents[0].said.count("epoch   6/6") == 1
    assert "epoch" not in agents[1].said
    assert json.loads((folder / "metrics.json").read_text())["processes"] == 2
    assert_same_end(folder, whole)


def test_a_killed_worker_ends_the_run_on_both_nodes(nodes: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agents = begin(nodes, folder)
    kill_worker(agents[1])
    assert [agent.wait() for agent in agents] == [1, 1]
    assert "Connection" in agents[0].said
    assert "Signal 9 (SIGKILL)" in agents[1].said
    wait_until_nothing_runs(nodes, *agents)
    assert status(folder) == "failed"


def test_a_restart_after_a_killed_worker_goes_on_by_itself(nodes: Nodes, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agents = begin(nodes, folder, restarts=1)
    kill_worker(agents[1])
    assert [agent.wait() for agent in agents] == [0, 0], "\n".join(agent.said for agent in agents)
    assert "; going on after epoch" in agents[0].said
    assert_same_end(folder, whole)


def assert_saved_without(nodes: Nodes, folder: Path, agent: int) -> None:
    """A run whose agent is killed on that node ends on both, and has saved itself."""
    agents = begin(nodes, folder)
    agents[agent].kill()
    assert agents[1 - agent].wait() == 1
    wait_until_nothing_runs(nodes, *agents)
    assert status(folder) == "preempted"


def test_without_an_agent_the_workers_of_both_nodes_save_the_run(nodes: Nodes, whole: Path, tmp_path: Path) -> None:
    """The second node's agent here: its own worker hears of its death."""
    folder = tmp_path / "run"
    assert_saved_without(nodes, folder, agent=1)
    assert (folder / checkpoints.MID_EPOCH).exists()
    assert resume(nodes, folder) == [0, 0]
    assert_same_end(folder, whole)


def test_without_the_agent_that_keeps_the_store_they_save_it_too(nodes: Nodes, tmp_path: Path) -> None:
    assert_saved_without(nodes, tmp_path / "run", agent=0)


def test_no_run_goes_on_in_a_folder_to_which_a_worker_without_agent_may_write(nodes: Nodes, tmp_path: Path) -> None:
    """The main process waits for the other one, which does not move."""
    folder = tmp_path / "run"
    agents = begin(nodes, folder)
    stopped = agents[1].worker()
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    for agent in agents:
        agent.kill()
    assert resume(nodes, folder) == [1, 1]
    assert f"another process is writing to {folder}" in (tmp_path / "run, resumed, node 1").read_text()
    assert status(folder) == "running"
    os.kill(stopped, signal.SIGCONT)
    wait_until_nothing_runs(nodes, *agents)
    assert status(folder) == "preempted"
