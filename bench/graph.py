"""Calls in one CUDA graph, timed on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Graph:
    """Calls captured once, one behind the other; `first` is what the first of them returned.

    The first call runs once before, on a stream aside, for what it makes once must not be captured.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.first = calls[0]()
            for call in calls[1:]:
                call()
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.time()

    def time(self) -> float:
        """Replays the graph; returns the seconds a call, without the host's work."""
        self.began.record()
        self.graph.replay()
        self.ended.record()
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3 / self.calls
