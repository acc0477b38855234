"""Time and memory of the loss on a CUDA GPU, forward and backward: our backends, published code, and the limit.

    python -m bench.loss.gpu speed   --output FILE     microseconds a call, eager and in a CUDA graph
    python -m bench.loss.gpu profile --output FILE     microseconds and launches of each kernel of a call
    python -m bench.loss.gpu memory  --output FILE     peak increase of the allocated memory
    ... --case largest                                 one case alone; a million anchors take part when they are named
    ... --bcl BCL/loss/contrastive.py --supcontrast SupContrast/losses.py      with the peers' own files
    ... --dry-run                                      tiny cases, on the CPU where there is no GPU: proves the script

It needs PyTorch and rcl_fast, nothing else; pytorch-metric-learning takes part where it is installed. Every variant is
warm before anything is timed; each round runs every variant once; inputs rotate through more memory than the L2 cache
has; figures are medians of the rounds. No figure comes from a wrong result: first our gradients are compared with
float64's, and a variant that is wrong is a row without a time, and exit status 1. The cases come by what they are
worth, each written when it is done, so that a call that is stopped has the first ones.

SupContrast and pytorch-metric-learning compute the plain loss, without prototypes, on the same anchors: less work.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.graph import Graph
from bench.loss.cases import (
    TEMPERATURE,
    Case,
    Inputs,
    Loss,
    available_backends,
    draw,
    metric_learning,
    ours,
    published_bcl,
    run,
    supcontrast,
    synchronize,
)
from bench.rows import append, spread

OURS = ("triton", "tiled", "dense", "dense, compiled")
TILED_OPERATIONS = 5e13  # beyond, `tiled` takes many seconds a call
COMPILED_ANCHORS = 512  # up to which `dense` is compiled too: larger ones tell no more for half a minute each
GRAPH_AT_MOST = 0.05  # seconds of a call; a longer one keeps the GPU busy by itself
PROFILED_CALLS = 5
COPIES = 1024  # sets of inputs at most
GRAPH_SECONDS = 0.05  # of one replay, about
ROUND_SECONDS = 0.02  # of one variant's turn, about: eager calls are too short to time one by one


LARGEST = Case("largest", 1048576, 1000, 128)  # seconds a call
CASES = (
    Case("CIFAR batch", 512, 100, 128),
    Case("ImageNet-LT batch", 512, 1000, 1024),
    Case("iNaturalist batch", 512, 8142, 1024),
    Case("large, narrow", 16384, 1000, 128),
    Case("very large", 131072, 1000, 128),
    Case("large, wide", 16384, 1000, 1024),
)
TINY_CASES = (Case("tiny", 32, 5, 16), Case("tiny, wide", 32, 11, 320))


class Peers(NamedTuple):
    """Files of repositories that are no part of ours; None: not measured."""

    bcl: Path | None = None
    supcontrast: Path | None = None


def variants(case: Case, peers: Peers, device: torch.device, only: Sequence[str] = ()) -> dict[str, Loss]:
    """Returns the variants by name, ours first: a peer that fails may leave the device in a bad state.

    only: names of the variants that are wanted; none: all.
    """
    found = {backend: ours(backend) for backend in available_backends(device)}
    if device.type == "cuda" and case.anchors <= COMPILED_ANCHORS:
        found["dense, compiled"] = torch.compile(found["dense"], dynamic=False)
    if peers.bcl is not None:
        found["BCL's BalSCL"] = published_bcl(peers.bcl, case.classes)
    if peers.supcontrast is not None:
        found["SupContrast's SupConLoss"] = supcontrast(peers.supcontrast)
    if importlib.util.find_spec("pytorch_metric_learning") is not None:
        found["pytorch-metric-learning's SupConLoss"] = metric_learning()
    wanted = {name: loss for name, loss in found.items() if not only or name in only}
    return {name: loss for name, loss in wanted.items() if is_feasible(name, case, device)}


def is_feasible(variant: str, case: Case, device: torch.device) -> bool:
    """Returns whether a variant fits: `tiled` by its time, others but `triton` by the memory of eight N×M matrices."""
    if variant == "triton" or device.type != "cuda":
        return True
    if variant == "tiled":
        return case.operations < TILED_OPERATIONS
    return 8 * case.matrix_bytes < torch.cuda.get_device_properties(device).total_memory


class Errors(NamedTuple):
    """Error of a loss, in float32 units of the largest logit 1/T, and the largest relative error of a gradient."""

    loss_units: float
    gradient: float

    def are_rounding(self, dtype: torch.dtype) -> bool:
        """Returns whether these errors are no more than rounding.

        Loss and gradient are sums of float32 terms: sixty-four units of either. A gradient's dlogits and result are
        rounded to the dtype too, by half a unit each at most. A NaN is no rounding.
        """
        gradient = torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
        return self.loss_units < 64 and self.gradient < gradient


def errors(loss: Loss, inputs: Inputs) -> Errors:
    """Returns a loss's errors against `tiled` in float64 (float32 where the batch is very large)."""
    dtype = torch.float64 if len(inputs.features) <= 2**15 else torch.float32
    exact = Inputs(
        inputs.features.detach().to(dtype).requires_grad_(),
        inputs.labels,
        inputs.prototypes.detach().to(dtype).requires_grad_(),
    )
    total, right = loss(inputs), ours("tiled")(exact)
    unit = torch.finfo(torch.float32).eps / TEMPERATURE
    pairs = zip(_gradients(total, inputs), _gradients(right, exact), strict=True)
    return Errors(
        float((total.detach().to(dtype) - right.detach()).abs()) / unit,
        float(torch.stack([(found.to(dtype) - exactly).norm() / exactly.norm() for found, exactly in pairs]).max()),
    )


def _gradients(total: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """Returns the gradients of features and prototypes; raises RuntimeError where the loss has none of one."""
    return torch.autograd.grad(total, (inputs.features, inputs.prototypes))


def check(name: str, loss: Loss, case: Case, inputs: Inputs) -> dict[str, float]:
    """Returns the errors of one of our variants; nothing for a peer, or where the case is too large for `tiled`.

    Raises ArithmeticError where an error is more than rounding.
    """
    if name in OURS and case.operations < TILED_OPERATIONS:
        found = errors(loss, inputs)
        if not found.are_rounding(inputs.features.dtype):
            raise ArithmeticError(
                f"wrong: relative error of a gradient {found.gradient:.1e}, {found.loss_units:.1e} units"
            )
        return {"gradient_error": found.gradient, "loss_error_units": found.loss_units}
    return {}


def input_sets(case: Case, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """Returns so many inputs that none is still in the L2 cache when its turn comes again."""
    first = draw(case, device, dtype)
    size = sum(tensor.nbytes for tensor in first)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else size
    return [
        first,
        *(draw(case, device, dtype, seed) for seed in range(1, min(COPIES, 1 + math.ceil(2 * cache / size)))),
    ]


class Eager:
    """Calls from Python, in turn over the input sets; wall time, the host's work included."""

    def __init__(self, loss: Loss, sets: list[Inputs], device: torch.device) -> None:
        self.loss, self.sets, self.device, self.next = loss, sets, device, 0
        self.calls = 1
        for _ in range(3):  # compile, and fill the allocator's pool
            seconds = self.time()
            if seconds > 1:
                break
        self.calls = max(1, min(len(sets), int(ROUND_SECONDS / seconds)))

    def time(self) -> float:
        """Calls the loss on the next input sets; returns the seconds a call."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(self.calls):
            run(self.loss, self.sets[self.next % len(self.sets)])
            self.next += 1
        synchronize(self.device)
        return (time.perf_counter() - began) / self.calls


def captured(loss: Loss, sets: list[Inputs], eager_seconds: float) -> Graph:
    """Captures a call on each of several input sets; raises ArithmeticError where gradients are not those of a call."""
    calls = max(1, min(len(sets), int(GRAPH_SECONDS / eager_seconds)))
    graph = Graph([partial(run, loss, inputs) for inputs in sets[:calls]])
    for found, expected in zip(graph.first, run(loss, sets[0]), strict=True):
        if found is not None and not (found - expected).norm() <= torch.finfo(found.dtype).eps * expected.norm():
            raise ArithmeticError("wrong: the graph's gradient is not that of the call")
    return graph


def prepare(name: str, loss: Loss, case: Case, sets: list[Inputs], device: torch.device) -> Iterator[tuple[dict, Any]]:
    """Gives (what is known, what to time) in each regime; of a variant that fails, its error and nothing to time."""
    known: dict[str, Any] = {"variant": name, "regime": "eager"}
    try:
        known |= check(name, loss, case, sets[0])
        eager = Eager(loss, sets, device)
    except Exception as error:  # published code fails in many ways: that is a row too
        yield {**known, "error": _first_line(error)}, None
        return
    yield known, eager
    if device.type != "cuda" or name not in OURS:
        return  # the peers copy from the host in each call, which a graph cannot hold
    seconds = eager.time()
    if seconds > GRAPH_AT_MOST:
        return
    try:
        yield {**known, "regime": "graph"}, captured(loss, sets, seconds)
    except (RuntimeError, ArithmeticError) as error:
        yield {**known, "regime": "graph", "error": _first_line(error)}, None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def speed(
    case: Case, losses: dict[str, Loss], device: torch.device, dtype: torch.dtype, seconds: float, peak: float
) -> list[dict]:
    """Times a case and returns its rows; `peak` is the measured speed of products alone, in operations a second."""
    sets = input_sets(case, device, dtype)
    prepared = [pair for name, loss in losses.items() for pair in prepare(name, loss, case, sets, device)]
    timed = [(known, timer, []) for known, timer in prepared if timer is not None]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or (rounds < 50 and time.perf_counter() < end):
        for _, timer, taken in timed:
            taken.append(timer.time())
        rounds += 1
    rows = [
        {
            **known,
            **(tiles(case, device, dtype) if known["variant"] == "triton" else {}),
            **microseconds(taken),
            "calls_a_round": timer.calls,
            "rounds": rounds,
            "input_sets": len(sets),
            "share_of_peak": case.operations / statistics.median(taken) / peak,
        }
        for known, timer, taken in timed
    ]
    limit = {"variant": "limit: the products at the measured peak", "regime": "graph"}
    rows.append({**limit, "microseconds": 1e6 * case.operations / peak, "share_of_peak": 1.0})
    return rows + [known for known, timer in prepared if timer is None]


def tiles(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the tiles and grids that the kernels take in a case: those of the anchors' passes."""
    from rcl_fast.kernels import block_sizes

    processor = block_sizes.processor(device)
    math_mode = block_sizes.math_mode_of(dtype, processor.arch)
    width = block_sizes.packed_width(case.dimensions)
    keys = block_sizes.aligned(case.anchors) + block_sizes.aligned(case.classes)
    second = "backward" if block_sizes.in_registers(processor, math_mode, width) else "dlogits"
    chosen = {
        name: block_sizes.choose(name, processor, math_mode, width, case.anchors, keys) for name in ("forward", second)
    }
    return {
        "tiles": {name: sizes for name, (sizes, _) in chosen.items()},
        "grids": {name: grid for name, (_, grid) in chosen.items()},
    }


def profile(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Gives a row for each kernel of a call of the fastest backend, the longest first; on a CPU for each operation.

    The inputs are the same each time: what fits into the L2 cache is there.
    """
    inputs = draw(case, device, dtype)
    name = available_backends(device)[0]
    loss = ours(name)
    for _ in range(3):
        run(loss, inputs)
    synchronize(device)
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if device.type == "cuda" else activity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        for _ in range(PROFILED_CALLS):
            run(loss, inputs)
        synchronize(device)
    on_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    taken = [(event.key, getattr(event, on_device), event.count) for event in profiled.key_averages()]
    for kernel, microseconds, launches in sorted(taken, key=lambda one: -one[1]):
        if microseconds:
            each = {"microseconds": microseconds / PROFILED_CALLS, "launches": launches / PROFILED_CALLS}
            yield {"variant": name, "kernel": kernel[:120], **each}


def microseconds(seconds: list[float]) -> dict[str, float]:
    return spread("microseconds", [1e6 * each for each in seconds])


def measured_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Returns the operations a second of one large square product, the best of ten."""
    size = size or (8192 if device.type == "cuda" else 256)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def empty_launch(device: torch.device) -> Iterator[dict[str, Any]]:
    """Times a kernel that does next to nothing; gives rows of what a launch costs from Python, and in a graph."""
    tiny = torch.zeros(1, device=device)

    def time_calls(calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            tiny.zero_()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    time_calls(1000)
    limit = {"variant": "limit: an empty launch"}
    yield {**limit, "regime": "eager", **microseconds([time_calls(1000) for _ in range(10)])}
    if device.type != "cuda":
        return
    graph = Graph([tiny.zero_] * 1000)
    yield {**limit, "regime": "graph", **microseconds([graph.time() for _ in range(10)])}


def memory(case: Case, losses: dict[str, Loss], device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Gives each variant's row: peak increase in MB over what is allocated before, of forward, and of both passes."""
    inputs = draw(case, device, dtype)
    base = sum(tensor.nbytes for tensor in inputs) + inputs.features.nbytes + inputs.prototypes.nbytes
    for name, loss in losses.items():
        known = {"variant": name, "inputs_and_gradients_mb": base / 1e6}
        try:
            run(loss, inputs)  # compiles, and makes the libraries take their own workspaces
            forward, both = peak_increases(loss, inputs, device)
        except Exception as error:  # published code fails in many ways: that is a row too
            yield {**known, "error": _first_line(error)}
            continue
        yield {**known, "forward_mb": forward, "both_mb": both}


def peak_increases(loss: Loss, inputs: Inputs, device: torch.device) -> tuple[float | None, float | None]:
    """Returns the MB of the forward pass alone, and of both passes with the gradients; None without a GPU."""
    if device.type != "cuda":
        return None, None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    total = loss(inputs)
    forward = torch.cuda.max_memory_allocated(device) - before
    gradients = torch.autograd.grad(total, (inputs.features, inputs.prototypes), allow_unused=True)
    torch.cuda.synchronize(device)
    del gradients
    return forward / 1e6, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "profile", "memory"))
    parser.add_argument("--output", type=Path, help="file of JSON lines to append the rows to")
    parser.add_argument("--bcl", type=Path, help="loss/contrastive.py of BCL's repository")
    parser.add_argument("--supcontrast", type=Path, help="losses.py of SupContrast's repository")
    every = [case.name for case in (*CASES, LARGEST)]
    parser.add_argument("--case", choices=every, action="append", help=f"default: all but {LARGEST.name}")
    parser.add_argument("--variant", action="append", help="as the rows name it; default: all")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing a case, warming up not counted")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases, on any machine; the rows say so")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        raise SystemExit("no CUDA device here: --dry-run proves the script; python -m bench.loss.cpu is for CPUs")
    for path in (options.bcl, options.supcontrast):
        if path is not None and not path.is_file():
            raise SystemExit(f"{path}: no such file; give the path inside a checkout of that repository")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.float16
    peers = Peers(options.bcl, options.supcontrast)
    named = CASES if options.case is None else [case for case in (*CASES, LARGEST) if case.name in options.case]
    failed = False

    def write(case: str, rows: list[dict[str, Any]]) -> None:
        print(f"\n{case}\n{table(rows)}", flush=True)
        common = {"part": options.part, "case": case, "dtype": str(dtype).removeprefix("torch."), "device": device.type}
        append(options.output, [{**common, **row} for row in rows], options.dry_run)

    if options.part == "speed":
        peak = measured_peak(device, dtype)
        write("limits", [{"variant": "limit: matrix products", "tflops": peak / 1e12}, *empty_launch(device)])
    for case in TINY_CASES if options.dry_run else named:
        losses = variants(case, peers, device, options.variant or ())
        if options.part == "speed":
            rows = speed(case, losses, device, dtype, 0.1 if options.dry_run else options.seconds, peak)
        elif options.part == "profile":
            rows = list(profile(case, device, dtype))
        else:
            rows = list(memory(case, losses, device, dtype))
        failed |= any("error" in row and row["variant"] in OURS for row in rows)
        sizes = {"anchors": case.anchors, "classes": case.classes, "dimensions": case.dimensions}
        write(case.name, [{**sizes, **row} for row in rows])
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


HEADINGS = {
    "kernel": "kernel",
    "launches": "launches",
    "regime": "regime",
    "microseconds": "µs",
    "microseconds_p20": "p20",
    "microseconds_p80": "p80",
    "share_of_peak": "share of peak",
    "tflops": "TFLOP/s",
    "forward_mb": "forward MB",
    "both_mb": "both MB",
    "inputs_and_gradients_mb": "inputs and gradients MB",
    "error": "error",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table of text; with the speed over the published code's, where that was measured."""
    shown = {name: heading for name, heading in HEADINGS.items() if any(row.get(name) is not None for row in rows)}
    published = next((row.get("microseconds") for row in rows if row["variant"] == "BCL's BalSCL"), None)
    lines = [["variant", *shown.values(), *(["× published"] if published else [])]]
    for row in rows:
        cells = [row["variant"], *(_cell(name, row.get(name)) for name in shown)]
        if published:
            taken = row.get("microseconds")
            cells.append(f"{published / taken:.1f}" if taken else "–")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name == "share_of_peak":
        return f"{value:.1%}"
    return value if isinstance(value, str) else f"{value:,.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
