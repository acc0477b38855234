"""Four processes with gloo between them that stay and carry out functions: no test needs to start its own."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

MOST = 4


class Processes:
    """Processes 0 to 3; `run` uses the first so many of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start()

    def _start(self) -> None:
        store = tempfile.mktemp(dir=self._folder)
        context = multiprocessing.get_context("forkserver")  # a plain fork would inherit the threads of this process
        context.set_forkserver_preload(["torch", "rcl_fast"])
        self._connections = []
        self._processes = []
        for rank in range(MOST):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """[function(group, *arguments)] of each of `world` processes, which `group` has; their failures are raised."""
        for connection in self._connections[:world]:
            connection.send_bytes(pickle.dumps((world, function, arguments)))
        waited, results = list(self._connections[:world]), [None] * world
        while waited:
            ready = wait(waited, timeout=60)
            if not ready:
                self.stop()
                self._start()
                silent = [self._connections.index(connection) for connection in waited]
                raise TimeoutError(f"no answer from processes {silent} of {world} in {function.__name__}")
            for connection in ready:
                rank = self._connections.index(connection)
                failed, results[rank] = pickle.loads(connection.recv_bytes())
                if failed:  # the others may wait for it for ever
                    self.stop()
                    self._start()
                    raise AssertionError(f"process {rank} of {world} failed:\n{results[rank]}")
                waited.remove(connection)
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()


def _serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST)
    groups = {world: distributed.new_group(list(range(world))) for world in range(1, MOST + 1)}
    while True:
        world, function, arguments = pickle.loads(connection.recv_bytes())
        try:
            answer = False, function(groups[world], *arguments)
        except Exception:
            answer = True, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
