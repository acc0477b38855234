"""Time and memory of the loss on a CPU, forward and backward: our backends, BCL's published code, and the limit.

    python bench/loss.py                                  our backends and three matrix products alone
    python bench/loss.py --peer BCL/loss/contrastive.py   with the published code (its repository is not part of ours)

Each round runs every variant once, so that a slow moment of the machine meets all alike; figures are medians. Memory
is the peak increase of the process over its inputs, each variant in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from rcl_fast import contrastive_loss


class Case(NamedTuple):
    """N anchors = 2 views of B samples; float32, long-tailed labels, prototypes (BCL's loss)."""

    samples: int
    classes: int
    dimensions: int

    def __str__(self) -> str:
        return f"{self.samples}×2 anchors, C={self.classes}, D={self.dimensions}"


CASES = [Case(256, 1000, 1024), Case(256, 8142, 1024), Case(4096, 1000, 128)]


class Inputs(NamedTuple):
    features: torch.Tensor  # [B, 2, D], a leaf
    labels: torch.Tensor  # [B]
    prototypes: torch.Tensor  # [C, D], a leaf


@dataclass
class Options:
    """What to measure."""

    peer: Path | None = None
    """The file loss/contrastive.py of BCL's repository."""
    rounds: int = 7
    """Rounds of each case; the first one warms up and is not counted."""
    threads: int = 2
    """CPU threads of PyTorch."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    console = Console()
    for case in CASES:
        rows = measure(case, options)
        console.print(table(case, rows))
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"case": str(case), **row, **machine.describe()}) + "\n" for row in rows)


def draw(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, case.classes + 1).float()
    return Inputs(
        torch.randn(case.samples, 2, case.dimensions, generator=generator).requires_grad_(),
        torch.multinomial(shares, case.samples, replacement=True, generator=generator),
        torch.randn(case.classes, case.dimensions, generator=generator).requires_grad_(),
    )


Variant = Callable[[Inputs], None]


def variants(case: Case, peer: Path | None) -> dict[str, Variant]:
    """Each runs forward and backward once."""
    found: dict[str, Variant] = {}
    if peer is not None:
        found["published"] = published(peer, case)
    found["dense"] = ours("dense")
    found["tiled, per anchor"] = ours_per_anchor("tiled")
    found["tiled"] = ours("tiled")
    found["three products"] = three_products
    return found


def ours(backend: str) -> Variant:
    def run(inputs: Inputs) -> None:
        features, labels, prototypes = inputs
        contrastive_loss(
            features, labels, prototypes=prototypes, temperature=0.1, class_average=True, backend=backend
        ).backward()

    return run


def ours_per_anchor(backend: str) -> Variant:
    """Through reduction="none", whose upstream gradient is not known before backward."""

    def run(inputs: Inputs) -> None:
        features, labels, prototypes = inputs
        losses = contrastive_loss(
            features,
            labels,
            prototypes=prototypes,
            temperature=0.1,
            class_average=True,
            backend=backend,
            reduction="none",
        )
        losses.mean().backward()

    return run


def published(path: Path, case: Case) -> Variant:
    """BCL's BalSCL, which wants normalised features."""
    spec = importlib.util.spec_from_file_location("published_bcl", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"--peer {path}: not a Python file; give loss/contrastive.py of BCL's repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    criterion = module.BalSCL([1] * case.classes, temperature=0.1)

    def run(inputs: Inputs) -> None:
        features, labels, prototypes = inputs
        criterion(F.normalize(prototypes, dim=1), F.normalize(features, dim=2), labels).backward()

    return run


def three_products(inputs: Inputs) -> None:
    """The limit of any way that computes each similarity once: one matrix product forward, two backward."""
    anchors = inputs.features.detach().flatten(0, 1)
    keys = torch.cat([anchors, inputs.prototypes.detach()])
    similarities = anchors @ keys.T
    similarities @ keys
    similarities.T @ anchors


def measure(case: Case, options: Options) -> list[dict[str, Any]]:
    inputs, runs = draw(case), variants(case, options.peer)
    agree(inputs, runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            inputs.features.grad = inputs.prototypes.grad = None
            began = time.perf_counter()
            run(inputs)
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


def agree(inputs: Inputs, runs: dict[str, Variant]) -> None:
    """No figure from a wrong result: every variant's gradients equal dense's."""
    gradients = {}
    for name in runs.keys() - {"three products"}:
        inputs.features.grad = inputs.prototypes.grad = None
        runs[name](inputs)
        gradients[name] = inputs.features.grad, inputs.prototypes.grad
    for name, pair in gradients.items():
        for found, expected in zip(pair, gradients["dense"], strict=True):
            difference = ((found - expected).norm() / expected.norm()).item()
            if not difference < 1e-5:
                raise SystemExit(f"{name} disagrees with dense: relative difference of a gradient {difference:.1e}")


def peak_increase_alone(variant: str, case: Case, options: Options) -> float | None:
    """In a fresh process, so that no variant profits from memory that another one freed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak_increase, variant, case, options).result()


def peak_increase(variant: str, case: Case, options: Options) -> float | None:
    """Megabytes by which the process's peak resident memory exceeds what it held before; None where not on Linux."""
    torch.set_num_threads(options.threads)
    run, inputs = variants(case, options.peer)[variant], draw(case)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # forget the peak so far
    before = _kilobytes(status, "VmRSS")
    run(inputs)
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
