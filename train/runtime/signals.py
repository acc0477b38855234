"""SIGTERM and SIGUSR1: a scheduler takes the machine away, and the run is to save itself at the next step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rcl_fast.train.runtime import distributed


class Preempted(Exception):
    """A signal came, and what can be saved has been."""


def never() -> bool:
    """For a run that no signal stops."""
    return False


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGUSR1 are noted; gives the function that says whether one has come to this process.

    Of several processes, Ctrl-C counts as such a signal too: torchrun passes it on to all of them.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set handlers
        yield never
        return
    main, received = os.getpid(), []

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() == main:  # a worker process that was forked has this handler too
            received.append(number)

    numbers = [signal.SIGTERM, signal.SIGUSR1] + [signal.SIGINT] * (distributed.world() > 1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
