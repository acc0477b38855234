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
SECONDS = 300  # without any answer: a machine with other work takes long, but not for ever


class Processes:
    """Processes 0 to 3; `run` uses the first so many of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        self._start()

    def _start(self) -> None:
        store = tempfile.mktemp(dir=self._folder)
        context = multiprocessing.get_context("forkserver")  # a plain fork would inherit the threads of this process
        context.set_forkserver_preload(["torch", "rcl_fast.losses", "rcl_fast.distributed"])
        self._connections = []
        self._processes = []
        for rank in range(MOST):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process ends its connection
            self._connections.append(mine)
            self._processes.append(process)

    def run(
        self, world: int, function: Callable[..., Any], *arguments: Any, seconds_of_silence: float = SECONDS
    ) -> list[Any]:
        """[function(group, *arguments)] of each of `world` processes, which `group` has; their failures are raised.

        Raises:
            AssertionError: one of them raised, or ended; the message has its traceback.
            TimeoutError: none of those that are waited for has answered for so long.
        """
        self._calls += 1
        results = [None] * world
        waited = {self._connections[rank]: rank for rank in range(world)}
        for connection in waited:
            connection.send_bytes(pickle.dumps((self._calls, world, function, arguments)))
        while waited:
            ready = wait(list(waited), timeout=seconds_of_silence)
            if not ready:
                self._start_again()
                silent = sorted(waited.values())
                raise TimeoutError(f"no answer from processes {silent} of {world} in {function.__name__}")
            for connection in ready:
                rank = waited[connection]
                call, failed, answer = self._answer(connection)
                if call != self._calls:  # of a call that did not wait for it
                    continue
                if failed:  # the others may wait for it for ever
                    self._start_again()
                    raise AssertionError(f"process {rank} of {world} failed:\n{answer}")
                results[rank] = answer
                del waited[connection]
        return results

    def _answer(self, connection: Connection) -> tuple[int, bool, Any]:
        try:
            return pickle.loads(connection.recv_bytes())
        except EOFError:
            return self._calls, True, "it has ended"

    def _start_again(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST)
    groups = {world: distributed.new_group(list(range(world))) for world in range(1, MOST + 1)}
    while True:
        call, world, function, arguments = pickle.loads(connection.recv_bytes())
        try:
            answer = pickle.dumps((call, False, function(groups[world], *arguments)))
        except Exception:
            answer = pickle.dumps((call, True, traceback.format_exc()))
        connection.send_bytes(answer)
