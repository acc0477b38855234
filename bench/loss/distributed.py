"""The loss over all processes against the usual way, which gathers features with a gradient: time and bytes of a step.

    python -m bench.loss.distributed                        2 and 4 processes with gloo on the CPU, or NCCL on all GPUs
    python -m bench.loss.distributed --processes 2 --output FILE

Variants, forward and backward, the same gradient of the features (checked before anything is timed):
    ours                               local anchors against all keys; lse and grad_losses travel backward
    gather with gradient, all rows     open_clip's default: every process computes the loss of all anchors
    gather with gradient, own rows     open_clip's --local-loss: local anchors; gradients of all features travel back

Rounds are interleaved, and each ends when the slowest process does; medians with p20 and p80. Bytes are what a process
receives in a ring of W, which for a gather is (W − 1) times what each gives, and as much for a scatter of sums.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather
from torch.multiprocessing import get_context
from torch.nn import functional as F

from bench.loss import cases
from bench.loss.cases import TEMPERATURE, Case, Inputs
from bench.rows import append, spread
from rcl_fast.distributed import bytes_sent

CASES = (
    Case("CIFAR", 512, 100, 128),
    Case("ImageNet-LT", 512, 1000, 1024),
    Case("large batch", 2048, 1000, 128),
)  # anchors of each process


@dataclass
class Options:
    """What to measure."""

    processes: tuple[int, ...] = ()
    """Numbers of processes; by default 2 and 4 on a CPU, all GPUs where there are two or more."""
    rounds: int = 20
    """Rounds; three more warm up and are not counted."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """Small cases and few rounds: proves the script."""


Step = Callable[[Inputs], Tensor]
"""Local inputs -> a loss whose backward gives W times the true gradient of the local features."""


def ours(inputs: Inputs) -> Tensor:
    return cases.ours("auto", group=distributed.group.WORLD)(inputs)


def all_rows(inputs: Inputs) -> Tensor:
    features, labels = torch.cat(all_gather(inputs.features)), gathered_labels(inputs.labels)
    return cases.ours("auto")(Inputs(features, labels, inputs.prototypes))


def local_rows(inputs: Inputs) -> Tensor:
    """Computes the loss in plain PyTorch, from the n×M similarities of the local anchors."""
    n, start = len(inputs.labels), distributed.get_rank() * len(inputs.labels)
    labels = gathered_labels(inputs.labels)
    keys = F.normalize(torch.cat([*all_gather(inputs.features), inputs.prototypes]), dim=1)
    key_labels = torch.cat([labels, torch.arange(len(inputs.prototypes), device=labels.device)])
    logits = F.normalize(inputs.features, dim=1) @ keys.T / TEMPERATURE
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[:, start : start + n].fill_diagonal_(True)
    positives = (inputs.labels[:, None] == key_labels) & ~itself
    counts = torch.bincount(key_labels, minlength=len(inputs.prototypes))[key_labels] - positives.int()
    weighted = (logits - counts.clamp(min=1).log()).masked_fill(itself, -torch.inf)
    losses = torch.logsumexp(weighted, 1) - (logits * positives).sum(1) / positives.sum(1)
    return losses.mean()  # every anchor has its prototype, so that the mean of means is the mean


def gathered_labels(labels: Tensor) -> Tensor:
    gathered = labels.new_empty(len(labels) * distributed.get_world_size())
    distributed.all_gather_into_tensor(gathered, labels)
    return gathered


STEPS: dict[str, Step] = {
    "ours": ours,
    "gather with gradient, all rows": all_rows,
    "gather with gradient, own rows": local_rows,
}


def received(variant: str, case: Case, world: int, dtype: torch.dtype) -> int:
    """Returns the bytes that a process receives in a step."""
    if variant == "ours":
        return (world - 1) * bytes_sent(case.anchors, case.dimensions, dtype)
    features = case.anchors * case.dimensions * dtype.itemsize
    return (world - 1) * (2 * features + 8 * case.anchors)  # features there, their gradients back, and labels


def main(options: Options) -> None:
    gpus = torch.cuda.device_count()
    worlds = options.processes or ((gpus,) if gpus > 1 else (2, 4))
    for world in worlds:
        rows = measure(world, options)
        Console().print(table(world, rows))
        append(options.output, rows, options.dry_run)


def measure(world: int, options: Options) -> list[dict[str, Any]]:
    """Runs `world` processes on this machine; returns a row for each case and variant."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        processes = [context.Process(target=work, args=(rank, world, folder, options)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a process failed; its traceback is above")
        return json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))


def work(rank: int, world: int, folder: str, options: Options) -> None:
    on_gpus = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    backend, dtype = ("nccl", torch.bfloat16) if on_gpus else ("gloo", torch.float32)
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = []
    for case in CASES:
        if options.dry_run:
            case = Case(case.name, 24, 12, 16)
        inputs = cases.draw(case, device, dtype, seed=rank)
        distributed.broadcast(inputs.prototypes.data, 0)
        check(inputs)
        seconds = rounds(inputs, device, 2 if options.dry_run else options.rounds)
        for variant, times in seconds.items():
            rows.append(
                {
                    "case": case.name,
                    "anchors_per_process": case.anchors,
                    "classes": case.classes,
                    "dimensions": case.dimensions,
                    "processes": world,
                    "backend": backend,
                    "dtype": str(dtype).removeprefix("torch."),
                    "variant": variant,
                    **spread("ms", [1e3 * seconds for seconds in times]),
                    "bytes_received": received(variant, case, world, dtype),
                    "rounds": len(times),
                }
            )
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    distributed.destroy_process_group()


def check(inputs: Inputs) -> None:
    """Raises AssertionError where gradients differ by more than rounding explains: no figure comes from a wrong one."""
    gradients = [gradient(step, inputs) for step in STEPS.values()]
    largest = gradients[0].abs().max()
    tolerance = 64 * torch.finfo(inputs.features.dtype).eps * largest
    for name, other in zip(STEPS, gradients, strict=True):
        error = (other - gradients[0]).abs().max()
        if not error <= tolerance:
            raise AssertionError(f"{name}: gradients differ by {error:.2e}, of {largest:.2e}")


def gradient(step: Step, inputs: Inputs) -> Tensor:
    return torch.autograd.grad(step(inputs), (inputs.features, inputs.prototypes))[0].float()


def rounds(inputs: Inputs, device: torch.device, count: int) -> dict[str, list[float]]:
    """Returns the seconds of each variant in each round, until the slowest process is done."""
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(count + 3):
        for name, step in STEPS.items():
            distributed.barrier()
            cases.synchronize(device)
            began = time.perf_counter()
            gradient(step, inputs)
            distributed.barrier()
            cases.synchronize(device)
            if number >= 3:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def table(world: int, rows: list[dict[str, Any]]) -> Table:
    shown = Table("case, of each process", "variant", title=f"{world} processes, {rows[0]['backend']}")
    for heading in ("ms (p20 to p80)", "× ours", "received"):
        shown.add_column(heading, justify="right")
    for row in rows:
        first = next(other for other in rows if other["case"] == row["case"])
        name = f"{row['anchors_per_process']} anchors, C={row['classes']}, D={row['dimensions']}"
        shown.add_row(
            name if row is first else "",
            row["variant"],
            f"{row['ms']:.1f} ({row['ms_p20']:.1f} to {row['ms_p80']:.1f})",
            f"{row['ms'] / first['ms']:.2f}",
            f"{row['bytes_received'] / 1e6:.2f} MB",
        )
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
