"""Time and memory of the loss, forward and backward: our backends, BCL's published code, and the limit.

    python -m bench.loss.cpu                                  our backends and three matrix products alone
    python -m bench.loss.cpu --peer BCL/loss/contrastive.py   with the published code, which is not part of ours

On a CPU. On a machine with a CUDA GPU this is `bench/gpu.py speed`, which has CUDA graphs and more peers. Each
round runs every variant once, so that a slow moment of the machine meets all alike; figures are medians. Memory is the
peak increase of the process over its inputs, each variant in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.loss import gpu
from bench.loss.cases import Case, Inputs, Loss, draw, ours, published_bcl, run
from bench.rows import append

CASES = [
    Case("ImageNet-LT batch", 512, 1000, 1024),
    Case("iNaturalist batch", 512, 8142, 1024),
    Case("large batch", 8192, 1000, 128),
]
CPU = torch.device("cpu")


@dataclass
class Options:
    """What to measure."""

    peer: Path | None = None
    """The file loss/contrastive.py of BCL's repository."""
    rounds: int = 7
    """On a CPU: rounds of each case; the first one warms up and is not counted."""
    threads: int = 2
    """On a CPU: PyTorch's threads."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""


def main(options: Options) -> None:
    if options.peer is not None and not options.peer.is_file():
        raise SystemExit(f"--peer {options.peer}: no such file; give loss/contrastive.py of BCL's repository")
    if torch.cuda.is_available():
        paths = {"--bcl": options.peer, "--output": options.output}
        gpu.main(["speed", *(part for name, path in paths.items() if path for part in (name, str(path)))])
        return
    torch.set_num_threads(options.threads)
    console = Console()
    for case in CASES:
        rows = measure(case, options)
        console.print(table(case, rows))
        append(options.output, [{"case": str(case), **row} for row in rows])


def variants(case: Case, peer: Path | None) -> dict[str, Callable[[Inputs], Any]]:
    """Returns functions by name; each runs forward and backward once."""
    found: dict[str, Loss] = {}
    if peer is not None:
        found["published"] = published_bcl(peer, case.classes)
    found["dense"] = ours("dense")
    found["tiled, per anchor"] = ours_per_anchor("tiled")
    found["tiled"] = ours("tiled")
    both_passes = {name: partial(run, loss) for name, loss in found.items()}
    return {**both_passes, "three products": three_products}


def ours_per_anchor(backend: str) -> Loss:
    """Returns our loss through reduction="none", whose grad_output is not known before backward."""
    losses = ours(backend, reduction="none")
    return lambda inputs: losses(inputs).mean()


def three_products(inputs: Inputs) -> None:
    """Runs the limit of any way that computes each similarity once: one matrix product forward, two backward."""
    anchors = inputs.features.detach()
    keys = torch.cat([anchors, inputs.prototypes.detach()])
    similarities = anchors @ keys.T
    similarities @ keys
    similarities.T @ anchors


def measure(case: Case, options: Options) -> list[dict[str, Any]]:
    inputs, runs = draw(case, CPU, torch.float32), variants(case, options.peer)
    agree(inputs, runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, both_passes in runs.items():
            began = time.perf_counter()
            both_passes(inputs)
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, values in seconds.items():
        deciles = statistics.quantiles(values[1:], n=10)
        rows.append(
            {
                "variant": name,
                "milliseconds": 1e3 * statistics.median(values[1:]),
                "milliseconds_p20": 1e3 * deciles[1],
                "milliseconds_p80": 1e3 * deciles[7],
                "peak_increase_mb": peak_increase_alone(name, case, options),
            }
        )
    return rows


def agree(inputs: Inputs, runs: dict[str, Callable[[Inputs], Any]]) -> None:
    """Raises SystemExit where a variant's gradients are not dense's: no figure comes from a wrong result."""
    gradients = {name: runs[name](inputs) for name in runs.keys() - {"three products"}}
    for name, pair in gradients.items():
        for found, expected in zip(pair, gradients["dense"], strict=True):
            difference = ((found - expected).norm() / expected.norm()).item()
            if not difference < 1e-5:
                raise SystemExit(f"{name} disagrees with dense: relative difference of a gradient {difference:.1e}")


def peak_increase_alone(variant: str, case: Case, options: Options) -> float | None:
    """Returns the peak increase in a fresh process, so that no variant profits from memory that another one freed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak_increase, variant, case, options).result()


def peak_increase(variant: str, case: Case, options: Options) -> float | None:
    """Returns the MB by which the process's peak memory exceeds what it held before; None where not on Linux."""
    torch.set_num_threads(options.threads)
    both_passes, inputs = variants(case, options.peer)[variant], draw(case, CPU, torch.float32)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # forget the peak so far
    before = _kilobytes(status, "VmRSS")
    both_passes(inputs)
    return (_kilobytes(status, "VmHWM") - before) / 1e3


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def table(case: Case, rows: list[dict[str, Any]]) -> Table:
    baseline, limit = rows[0], rows[-1]
    shown = Table("variant", title=str(case))
    for heading in ("ms", "p20 to p80", f"faster than {baseline['variant']}", "share of limit", "peak MB"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row["variant"],
            f"{row['milliseconds']:,.1f}",
            f"{row['milliseconds_p20']:,.1f} to {row['milliseconds_p80']:,.1f}",
            f"{baseline['milliseconds'] / row['milliseconds']:.2f}×",
            f"{limit['milliseconds'] / row['milliseconds']:.0%}",
            "–" if row["peak_increase_mb"] is None else f"{row['peak_increase_mb']:,.0f}",
        )
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
