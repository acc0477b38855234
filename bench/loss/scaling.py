"""A cost model of the loss over many GPUs: time of a step on the wire and in products, ours and the usual way.

    python -m bench.loss.scaling            prints the table of docs/scaling.md, draws docs/figures/scaling.svg

It is a model, not a measurement: every constant is an assumption, and an option. bench/loss/distributed.py measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from rcl_fast.distributed import bytes_sent


@dataclass(frozen=True)
class Assumptions:
    """Assumptions on the network, the GPU and the batch."""

    anchors: int = 512
    """Anchors of each GPU (256 images, two views)."""
    dimensions: int = 1024
    """Width of the embeddings."""
    classes: int = 1000
    """Prototypes."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    within: float = 300e9
    """Bytes a second that a GPU sends within its node."""
    between: float = 40e9
    """Bytes a second that a GPU sends to other nodes."""
    latency_within: float = 3e-6
    """Seconds of a message within the node."""
    latency_between: float = 8e-6
    """Seconds of a message to another node."""
    operations: float = 300e12
    """Operations a second of 16-bit matrix products, about a third of an H100's peak."""


class Cost(NamedTuple):
    """Cost of one step, on each GPU."""

    wire: float  # seconds
    products: float  # seconds
    received: float  # bytes
    memory: float  # bytes of features and the largest gradient buffer


WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WAYS = ("ours", "gather with gradient, own rows", "gather with gradient, all rows")


def gather_seconds(world: int, sent: float, a: Assumptions) -> float:
    """Returns the seconds of a gather of `sent` bytes from each GPU, or a scatter of sums, whose cost is the same.

    Log2 W messages follow one another (as libraries send small ones), and W − 1 times `sent` bytes pass each GPU;
    between nodes a GPU carries an eighth of what its node receives, and within its node it passes everything on.
    """
    local = min(world, a.gpus_per_node)
    nodes = world // local
    messages = (local - 1).bit_length() * a.latency_within + (nodes - 1).bit_length() * a.latency_between
    from_others = (world - local) / a.gpus_per_node * sent / a.between
    return messages + from_others + (world - 1) * sent / a.within


def cost(way: str, world: int, a: Assumptions) -> Cost:
    """Returns the cost of one step with bfloat16 features."""
    n, N, D, C = a.anchors, a.anchors * world, a.dimensions, a.classes
    features = n * D * 2
    if way == "ours":
        sent = bytes_sent(n, D, torch.bfloat16)
        parts = [16, features + 8 * n, 8 * n]
        rows = n
    else:
        sent = 2 * features + 8 * n
        parts = [8 * n, features, features]
        rows = n if way.endswith("own rows") else N
    wire = sum(gather_seconds(world, part, a) for part in parts)
    # Forward 2·rows·M·D. Backward ours: similarities again, and one product for local rows and columns together; the
    # usual way: one for the rows, one for the columns. The prototypes' gradient: one.
    products = {"ours": 6 * n * (N + C) + 4 * C * n}.get(way, 6 * rows * (N + C)) * D
    held = N * D * 2 if way == "ours" else 2 * N * D * 2
    return Cost(wire, products / a.operations, (world - 1) * sent, held)


def main(a: Assumptions) -> None:
    print(table(a))
    draw(a, Path(__file__).resolve().parents[2] / "docs" / "figures" / "scaling.svg")


def table(a: Assumptions) -> str:
    """Returns a Markdown table: milliseconds of wire and products, and megabytes received, of each way."""
    lines = ["| GPUs | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]
    for world in WORLDS:
        costs = [cost(way, world, a) for way in WAYS]
        cells = [f"{1e3 * c.wire:.2f} + {1e3 * c.products:.2f} ms, {c.received / 1e6:,.0f} MB" for c in costs]
        lines.append(f"| {world:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(a: Assumptions, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rcl_fast"  # the same file every time
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way in WAYS:
        costs = [cost(way, world, a) for world in WORLDS]
        (line,) = time.plot(WORLDS, [1e3 * (c.wire + c.products) for c in costs], label=way)
        time.plot(WORLDS, [1e3 * c.wire for c in costs], color=line.get_color(), linestyle="--", linewidth=1)
        memory.plot(WORLDS, [c.memory / 2**20 for c in costs], color=line.get_color())
    time.set(ylabel="ms a step (dashed: on the wire)", title="Model, not a measurement")
    memory.set(ylabel="MiB of features and their gradients, each GPU", title="Memory")
    for axes in (time, memory):
        axes.set(xlabel="GPUs", xscale="log", yscale="log")
        axes.set_xticks(WORLDS, [f"{world:,}" for world in WORLDS], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(tyro.cli(Assumptions, description=__doc__))
