"""The processes that tests share: an answer is of its call, and one that fails or is silent spoils no later test."""

import os
import time
from typing import Any

import processes as module
import pytest
from processes import Processes


def told(group: Any, text: str) -> str:
    return f"{text} in {group.rank()}"


def failing(group: Any) -> None:
    if group.rank() == 1:
        raise KeyError("broken")


def ending(group: Any) -> None:
    if group.rank() == 1:
        os._exit(3)


def silent(group: Any) -> None:
    if group.rank() == 1:
        time.sleep(3600)


def test_an_answer_that_comes_late_is_not_the_next_calls(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processes.run(2, told, "first")
    assert processes.run(2, told, "second") == ["second in 0", "second in 1"]


def test_a_failure_is_told_and_the_next_call_has_new_processes(processes: Processes) -> None:
    with pytest.raises(AssertionError, match=r"(?s)process 1 of 2 failed:.*KeyError: 'broken'"):
        processes.run(2, failing)
    with pytest.raises(AssertionError, match="process 1 of 2 failed:\nit has ended"):
        processes.run(2, ending)
    with pytest.raises(TimeoutError, match=r"no answer from processes \[(0, )?1\] of 2 in silent"):
        processes.run(2, silent, seconds_of_silence=1)
    assert processes.run(2, told, "again") == ["again in 0", "again in 1"]
