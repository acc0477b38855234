"""SIGTERM and SIGUSR1: a scheduler takes the machine away, and the run has to save itself at the next step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rcl_fast.train.runtime import distributed

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def stop_with_parent() -> None:
    """Has the system send SIGTERM to this process when its parent dies: without torchrun nobody would ever stop it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def never() -> bool:
    """Returns False, as the `should_stop` of a run that no signal stops."""
    return False


@contextmanager
def handle_signals() -> Iterator[Callable[[], bool]]:
    """Records SIGTERM and SIGUSR1; gives a function that returns whether this process has received one.

    With several processes, Ctrl-C counts as such a signal too: torchrun passes it on to all of them.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield never
        return
    main, received = os.getpid(), []

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() == main:  # a worker process that was forked has this handler too
            received.append(number)

    numbers = [signal.SIGTERM, signal.SIGUSR1] + [signal.SIGINT] * (distributed.world_size() > 1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
