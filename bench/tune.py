"""Choose block sizes for `kernels/table.py`: by time on a GPU, and without one by what the compiler accepts.

    python bench/tune.py                  # on a GPU: time each candidate for its architecture, print the best
    python bench/tune.py --dry-run        # anywhere: candidates, with those that spill or do not fit struck out
    ... --write                           # put the choice into kernels/table.py

Without a GPU the order of the candidates decides, which is an argument and no measurement: the largest tiles first,
as they read each key the fewest times, and of equal tiles the deeper pipeline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aot
import torch
import triton

from rcl_fast.kernels import configs, launch
from rcl_fast.kernels.configs import Config

TABLE_FILE = Path(__file__).parents[1] / "kernels" / "table.py"
Entry = tuple[str, int, str, int]  # kernel, architecture, kind, width

# (rows, keys, warps), best first. wgmma and tcgen05 want 64 rows for each four warps.
LARGE = {
    "forward": ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4), (32, 32, 4), (16, 16, 4)),
    "backward": (
        (128, 64, 8),
        (64, 64, 8),
        (64, 64, 4),
        (64, 32, 8),
        (64, 32, 4),
        (32, 32, 4),
        (16, 32, 4),
        (16, 16, 4),
    ),
    "weights": (
        (128, 128, 8),
        (128, 128, 16),
        (128, 64, 8),
        (128, 64, 4),
        (64, 64, 4),
        (64, 32, 4),
        (32, 32, 4),
        (16, 16, 4),
    ),
}
SMALL = ((64, 64, 4), (64, 32, 4), (64, 32, 8), (32, 32, 4), (16, 32, 4), (16, 16, 4))


def candidates(kernel: str, arch: int, kind: str, width: int, large: bool) -> Iterator[Config]:
    """Block sizes worth a try, best guess first."""
    whole_row = triton.next_power_of_2(width)
    if kernel == "backward" or width <= 256:
        depths: tuple[int, ...] = (whole_row,) if kernel == "backward" else (whole_row, 64, 32, 16)
    else:
        depths = (64, 32, 16)
    if kernel != "backward" and (kind == "ieee" or arch < 80):
        depths = (16,)  # without tensor cores every feature of a step takes registers
    tiles: tuple[tuple[int, int, int], ...] = LARGE[kernel] if large else SMALL
    if kernel == "backward" and (kind == "ieee" or arch < 80):
        tiles = tiles[-3:]  # nor is there any use in trying a larger tile beside a whole row
    for rows, keys, warps in tiles:
        for depth in depths:
            for stages in (3, 2, 1):
                yield Config(rows, keys, depth, warps, stages)


def entries(arch: int, only: str | None = None) -> Iterator[Entry]:
    for kernel in (only,) if only else configs.WIDTHS:
        for kind in configs.kinds(arch):
            for width in configs.WIDTHS[kernel]:
                if kernel != "backward" or configs.in_registers(arch, kind, width):
                    yield kernel, arch, kind, width


def accepted(entry: Entry, large: bool) -> Iterator[Config]:
    """The candidates without a spill and with enough shared memory, in each of the entry's variants."""
    kernel, arch, kind, width = entry
    spilling = set()  # tiles: the depth of the pipeline changes nothing about their registers
    for config in candidates(kernel, arch, kind, width, large):
        if config[:4] in spilling:
            continue
        outcomes = (aot.compile_case(case) for case in aot.cases_of(*entry, config))
        failed = next((outcome for outcome in outcomes if not outcome.fits(arch)), None)
        if failed is None:
            yield config
        elif failed.stack or failed.local:
            spilling.add(config[:4])


def first_accepted(entry: Entry) -> tuple[Config | None, ...]:
    """(large, small) by order alone."""
    sizes = tuple(next(accepted(entry, large), None) for large in (True, False))
    print(*entry, *(size and tuple(size) for size in sizes), file=sys.stderr, flush=True)
    return sizes


def fastest(entry: Entry, large: bool) -> Config:
    """The quickest accepted candidate for a problem of its size, timed on this machine's GPU."""
    kernel, _, kind, width = entry
    N, C = (16384, 1000) if large else (512, 100)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if kind == "ieee" else "high")
    features = torch.randn(N, width, device="cuda", dtype=torch.bfloat16 if kind == "half" else torch.float32)
    prototypes = torch.randn(C, width, device="cuda", dtype=features.dtype)
    labels = torch.randint(C, (N,), device="cuda")
    upstream = torch.full((N,), 1 / N, device="cuda")
    choose = configs.choose

    def run() -> None:
        _, lse, keys, vectors, key_labels = launch.forward(features, prototypes, labels, None, None, C, 0.1, True, True)
        if kernel != "forward":
            launch.backward(keys, vectors, key_labels, lse, upstream, width, True, True, True, True, False)

    times = {}
    for config in accepted(entry, large):
        configs.choose = lambda name, *rest, config=config: config if name == kernel else choose(name, *rest)
        try:
            times[config] = triton.testing.do_bench(run, return_mode="median")
        finally:
            configs.choose = choose
        print(entry, tuple(config), f"{times[config] * 1e3:.1f} µs", flush=True)
    torch.set_float32_matmul_precision(precision)
    return min(times, key=times.__getitem__)


def write(chosen: dict[Entry, tuple[Config, ...]], measured: str) -> None:
    """kernels/table.py with these entries in place of its own."""
    table = {**aot.TABLE, **{entry: tuple(tuple(config) for config in sizes) for entry, sizes in chosen.items()}}
    lines = [
        '"""Block sizes (rows, keys, depth, warps, stages) by (kernel, architecture, kind, width up to).',
        "",
        "The large tile first, then the one for problems too small to give every multiprocessor a large one.",
        f"Written by bench/tune.py; {measured}",
        '"""',
        "",
        "TABLE: dict[tuple[str, int, str, int], tuple[tuple[int, int, int, int, int], ...]] = {",
        *(f"    {key!r}: {sizes!r},".replace("'", '"') for key, sizes in sorted(table.items())),
        "}",
    ]
    TABLE_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="no GPU: candidates as the compiler accepts them")
    parser.add_argument("--arch", type=int, nargs="*", choices=configs.ARCHITECTURES, help="dry run: default all")
    parser.add_argument("--kernel", choices=configs.WIDTHS, help="default: all")
    parser.add_argument("--write", action="store_true", help="change kernels/table.py")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.dry_run:
        wanted = [entry for arch in options.arch or configs.ARCHITECTURES for entry in entries(arch, options.kernel)]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            chosen: dict[Entry, Any] = dict(zip(wanted, pool.map(first_accepted, wanted), strict=True))
        measured = "chosen by what compiles without spills, not by time: no GPU has been at hand."
    elif torch.cuda.is_available():
        arch = configs.architecture(torch.device("cuda"))
        chosen = {entry: (fastest(entry, True), fastest(entry, False)) for entry in entries(arch, options.kernel)}
        measured = f"sm_{arch} timed on {torch.cuda.get_device_name()}, the rest by what compiles without spills."
    else:
        raise SystemExit("no CUDA device here: timing needs one; --dry-run lists what would be timed")
    for entry, sizes in chosen.items():
        print(*entry, *(size and tuple(size) for size in sizes), flush=True)
    if None in (size for sizes in chosen.values() for size in sizes):
        raise SystemExit("an entry has no candidate that the compiler accepts: add smaller ones")
    if options.write:
        write(chosen, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
