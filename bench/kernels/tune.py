"""Choose block sizes for `kernels/block_size_table.py`: by time on a GPU, and without one by what the compiler accepts.

    python -m bench.kernels.tune              # on a GPU: every entry, large and small
    ... --kernel forward --kind half --width 128 --size large --output FILE      # one entry, and rows
    ... --write                               # a tile that beats the shipped one by both spreads goes into the table
    ... --dry-run --arch 90                   # anywhere: all but the timing; --output gets the compiler's report
    ... --dry-run --write                     # a table without a GPU: the largest tile that compiles without a spill

First the candidates are compiled, by as many processes as there are cores, in both of the entry's variants (aot.py);
those that spill or do not fit are struck out. Where fewer registers would let a multiprocessor hold more programs, a
candidate is compiled with that limit too. Then what is left takes turns on the GPU, which finds all in Triton's cache
(if the table knows its very architecture): in each round every candidate runs once, in a CUDA graph of the pass that it
belongs to. The best candidate of each tile comes first, then the second best of each, and so on; better are more
programs on a multiprocessor, deeper steps, and a deeper pipeline. The shipped tile always takes part.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from bench.graph import Graph
from bench.kernels import aot
from bench.rows import append, spread
from rcl_fast.kernels import block_sizes, passes
from rcl_fast.kernels.block_sizes import BlockSizes
from rcl_fast.kernels.pack import KernelInputs, Packed

TABLE_FILE = Path(__file__).resolve().parents[2] / "kernels" / "block_size_table.py"
SIZES = {"large": 0, "small": -1}  # where an entry of the table holds the tile
PROBLEMS = {"large": (16384, 1000), "small": (512, 100)}  # anchors and classes that a tile is timed with
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = (3, 50)  # at least for a spread, and at most
REPLAY_SECONDS = 0.005  # of one turn, about: one call of a small problem is too short for the clock
CALLS = 100  # in one graph at most

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
    "dlogits": (
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

UNKNOWN = 1  # programs a multiprocessor of a candidate that is not compiled yet

Thing = TypeVar("Thing")


class Choice(NamedTuple):
    """What is chosen: one of the tiles of one entry of the table."""

    kernel: str
    arch: int
    kind: str
    width: int
    size: str

    @property
    def entry(self) -> tuple[str, int, str, int]:
        return self.kernel, self.arch, self.kind, self.width

    @property
    def shipped(self) -> BlockSizes:
        return BlockSizes(*aot.TABLE[self.entry][SIZES[self.size]])

    def __str__(self) -> str:
        return f"{self.kernel}, sm_{self.arch}, {self.kind}, width {self.width}, {self.size}"


class Trial(NamedTuple):
    """A candidate as compiled: in the variant that is timed, or in the first that was refused."""

    config: BlockSizes
    outcome: aot.Outcome


def choices(
    archs: Iterable[int],
    kernels: Sequence[str] = (),
    kinds: Sequence[str] = (),
    widths: Sequence[int] = (),
    sizes: Sequence[str] = (),
) -> list[Choice]:
    """Returns the table's tiles of these architectures, kernels and so on; an empty sequence stands for all."""
    return [
        Choice(kernel, arch, math_mode, width, size)
        for arch in archs
        for kernel in block_sizes.WIDTHS
        for math_mode in block_sizes.math_modes(arch)
        for width in block_sizes.WIDTHS[kernel]
        for size in SIZES
        if (kernel, arch, math_mode, width) in aot.TABLE
        if all(
            not wanted or found in wanted
            for found, wanted in ((kernel, kernels), (math_mode, kinds), (width, widths), (size, sizes))
        )
    ]


def candidates(choice: Choice) -> Iterator[BlockSizes]:
    """Gives block sizes worth a try, the largest tiles first: they read each key the fewest times."""
    kernel, arch, math_mode, width, size = choice
    whole_row = triton.next_power_of_2(width)
    exact = math_mode == "ieee" or arch < 80
    if kernel == "backward":
        depths: tuple[int, ...] = (whole_row,)
    elif exact:
        depths = (16,)  # without tensor cores every feature of a step takes registers
    else:
        depths = tuple(dict.fromkeys((*((whole_row,) if width <= 256 else ()), 64, 32, 16)))
    tiles: tuple[tuple[int, int, int], ...] = LARGE[kernel] if size == "large" else SMALL
    if kernel == "backward" and exact:
        tiles = tiles[-3:]  # nor is there any use in trying a larger tile beside a whole row
    for rows, keys, warps in tiles:
        for depth in depths:
            for stages in (3, 2, 1):
                yield BlockSizes(rows, keys, depth, warps, stages, UNKNOWN)


def limited(config: BlockSizes, outcome: aot.Outcome, arch: int) -> Iterator[BlockSizes]:
    """Gives `config` with each limit of registers by which a multiprocessor holds more programs, the largest first."""
    at_most = outcome._replace(registers=32).programs(arch, config.warps)  # with so few, registers never decide
    for programs in range(outcome.programs(arch, config.warps) + 1, at_most + 1):
        yield config._replace(maxnreg=aot.REGISTERS // (32 * config.warps * programs) // 8 * 8)


def in_turns(items: Iterable[Thing], tile: Callable[[Thing], Hashable]) -> list[Thing]:
    """Returns the first item of each tile, then the second of each, and so on."""
    of_tile: dict[Hashable, list[Thing]] = {}
    for item in items:
        of_tile.setdefault(tile(item), []).append(item)
    return [item for turn in zip_longest(*of_tile.values()) for item in turn if item is not None]


def tile_of(config: BlockSizes) -> tuple[int, int, int]:
    return config.rows, config.keys, config.warps


def in_order(trials: Iterable[Trial], arch: int) -> list[Trial]:
    """Returns the trials by the compiler's counts: the best of each tile, then the second best of each, and so on."""

    def promise(trial: Trial) -> tuple[int, int, int]:
        config = trial.config
        programs = trial.outcome.programs(arch, config.warps)
        return programs * config.rows * config.keys, config.depth, config.stages

    return in_turns(sorted(trials, key=promise, reverse=True), lambda trial: tile_of(trial.config))


def compiled(choice: Choice, config: BlockSizes) -> Trial:
    """Compiles the variants of the entry; returns the first that is refused, or else the first, which is timed.

    The trial's tile says how many programs a multiprocessor holds.
    """
    outcomes = []
    for case in aot.cases_of(*choice.entry, config):
        outcomes.append(aot.compile_case(case))
        if not outcomes[-1].fits(choice.arch):
            return Trial(config, outcomes[-1])
    return Trial(config._replace(programs=outcomes[0].programs(choice.arch, config.warps)), outcomes[0])


def uncompiled(config: BlockSizes) -> BlockSizes:
    """Returns a tile as it is before the compiler says how many programs a multiprocessor holds."""
    return config._replace(programs=UNKNOWN)


def compiled_with_limits(choice: Choice, config: BlockSizes) -> list[Trial]:
    """Compiles a candidate as it is, and with ever fewer registers until one is refused; returns all these trials."""
    trials = [compiled(choice, config)]
    if trials[0].outcome.fits(choice.arch):
        for tighter in limited(config, trials[0].outcome, choice.arch):
            trials.append(compiled(choice, tighter))
            if not trials[-1].outcome.fits(choice.arch):
                break
    return trials


def spills(trial: Trial) -> bool:
    return trial.outcome.stack > 0 or trial.outcome.local > 0


def registers_of(config: BlockSizes) -> BlockSizes:
    """Returns what a candidate's registers depend on: all but the depth of the pipeline."""
    return uncompiled(config)._replace(stages=0)


def explore(choice: Choice, most: int, pool: Executor, processes: int) -> list[Trial]:
    """Returns the shipped tile, then at most `most` others that the compiler accepts, in order.

    All are in Triton's cache. Raises SystemExit where the compiler refuses the shipped tile.
    """
    shipped = choice.shipped
    waiting = iter(dict.fromkeys((uncompiled(shipped), *in_turns(candidates(choice), tile_of))))
    accepted: dict[BlockSizes, Trial] = {}
    spilling: set[BlockSizes] = set()
    print(f"\n{choice}: compiling", flush=True)
    while len(accepted) <= most:
        batch = list(islice((one for one in waiting if registers_of(one) not in spilling), processes))
        if not batch:
            break
        for trials in pool.map(partial(compiled_with_limits, choice), batch):
            spilling |= {registers_of(trial.config) for trial in trials if spills(trial)}
            accepted |= {uncompiled(trial.config): trial for trial in trials if trial.outcome.fits(choice.arch)}
            for trial in trials:
                print(f"  {described(trial, choice.arch)}", flush=True)
    if uncompiled(shipped) not in accepted:
        raise SystemExit(f"{choice}: the compiler refuses the shipped tile")
    return [accepted.pop(uncompiled(shipped)), *in_order(accepted.values(), choice.arch)[:most]]


def described(trial: Trial, arch: int) -> str:
    config, outcome = trial
    counts = f"{outcome.registers:4} registers, {outcome.shared:7} B shared"
    if outcome.fits(arch):
        verdict = f"programs a multiprocessor: {outcome.programs(arch, config.warps)}"
    elif outcome.error:
        verdict = f"struck out: {outcome.error}"
    elif spills(trial):
        verdict = f"struck out: spills {outcome.stack + outcome.local} B a thread"
    else:
        verdict = f"struck out: {aot.SHARED_LIMIT[arch]} B shared are the most"
    return f"{written(config)!s:32} {counts}, {verdict}"


def written(config: BlockSizes) -> tuple[int, ...]:
    """Returns a tile as the table has it."""
    return tuple(number for number in config if number is not None)


@contextmanager
def every_launch_takes(kernel: str, config: BlockSizes) -> Iterator[None]:
    """Makes each launch of this kernel take `config` instead of the table's choice, within a `with` block."""
    shipped = block_sizes.candidates
    block_sizes.candidates = lambda name, *rest: (config,) if name == kernel else shipped(name, *rest)
    try:
        yield
    finally:
        block_sizes.candidates = shipped


def pass_of(choice: Choice, device: torch.device) -> Callable[[], object]:
    """Returns the pass that launches the kernel, on made-up inputs, in the variant that `compiled` compiles first."""
    N, C = PROBLEMS[choice.size]
    dtype = DTYPES[next(aot.cases_of(*choice.entry, choice.shipped)).dtype]
    features = torch.randn(N, choice.width, device=device, dtype=dtype)
    prototypes = torch.randn(C, choice.width, device=device, dtype=dtype)
    labels = torch.randint(C, (N,), device=device)
    grad_output = torch.full((N,), 1 / N, device=device)

    inputs = KernelInputs(
        features,
        None,
        prototypes,
        labels,
        None,
        None,
        None,
        root=3.8,
        num_classes=C,
        anchors_are_keys=True,
        class_average=True,
        normalize=True,
        bounded=True,
    )

    def forward() -> tuple[torch.Tensor, ...]:
        return passes.forward(inputs)

    _, lse, *packed = forward()
    options = passes.BackwardOptions.of(inputs)

    def backward() -> object:
        return passes.backward(Packed(*packed), lse, grad_output, options, (True, False, True))

    return forward if choice.kernel == "forward" else backward


def timer(run: Callable[[], object], kernel: str, config: BlockSizes) -> Callable[[], float]:
    """Returns a function that replays a CUDA graph of several calls; that returns the seconds a call on the device."""
    with every_launch_takes(kernel, config):
        run()  # loads the kernels; the next one tells how many calls fill a turn
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        calls = max(1, min(CALLS, int(REPLAY_SECONDS / (time.perf_counter() - start))))
        return Graph([run] * calls).time


def in_rounds(
    timers: Iterable[Callable[[], Callable[[], float]]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Runs all timers in each round, as long as the seconds last; returns the figures of each.

    Timers for which the seconds do not suffice are left out. To make one ready takes longer than a round: a quarter of
    the seconds for that leaves three rounds.
    """
    began = clock()
    ready: list[Callable[[], float]] = []
    for make in timers:
        ready.append(make())
        if clock() - began > seconds / 4:
            break
    taken: list[list[float]] = [[] for _ in ready]
    fewest, most = ROUNDS
    last = 0.0
    for done in range(most):
        start = clock()
        if done >= fewest and start - began + last > seconds:
            break
        for figures, run in zip(taken, ready, strict=True):
            figures.append(run())
        last = clock() - start
    return taken


def timed(choice: Choice, trials: Sequence[Trial], seconds: float) -> list[list[float]]:
    """Returns the seconds a call of each trial, in rounds; of fewer trials where the seconds do not suffice."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if choice.kind == "ieee" else "high")
    try:
        run = pass_of(choice, torch.device("cuda"))
        return in_rounds([partial(timer, run, choice.kernel, trial.config) for trial in trials], seconds)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.cuda.empty_cache()


def row(choice: Choice, trial: Trial, taken: Sequence[float]) -> dict[str, Any]:
    """Returns a trial's row of the results, without a time where it was not timed."""
    found = {
        **choice._asdict(),
        "config": written(trial.config),
        "shipped": uncompiled(trial.config) == uncompiled(choice.shipped),
        "registers": trial.outcome.registers,
        "shared": trial.outcome.shared,
        "programs": trial.outcome.programs(choice.arch, trial.config.warps),
        "rounds": len(taken),
    }
    return {**found, **(spread("microseconds", [1e6 * seconds for seconds in taken]) if taken else {})}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table of text, the shipped tile first."""
    lines = [f"{'candidate':32} registers  shared  programs        µs   p20 – p80            × shipped"]
    for one in found:
        line = f"{one['config']!s:32} {one['registers']:9} {one['shared']:7} {one['programs']:9}"
        if "microseconds" in one:
            spread = f"{one['microseconds_p20']:.1f} – {one['microseconds_p80']:.1f}"
            line += f" {one['microseconds']:9.1f}   {spread:20} {one['microseconds'] / found[0]['microseconds']:.2f}"
        lines.append(line + "  the shipped one" * one["shipped"])
    return "\n".join(lines)


def best(found: Sequence[dict[str, Any]]) -> BlockSizes | None:
    """Returns the quickest candidate, if four fifths of its rounds beat four fifths of the shipped one's; else None."""
    shipped, *others = (one for one in found if "microseconds" in one)
    quickest = min(others, key=lambda one: one["microseconds"], default=shipped)
    return BlockSizes(*quickest["config"]) if quickest["microseconds_p80"] < shipped["microseconds_p20"] else None


def first_accepted(choice: Choice) -> BlockSizes:
    """Returns the first candidate that the compiler accepts, the largest first; raises SystemExit if there is none."""
    spilling = set()
    for config in candidates(choice):
        if registers_of(config) not in spilling:
            trial = compiled(choice, config)
            if trial.outcome.fits(choice.arch):
                print(f"{choice}: {written(trial.config)}", flush=True)
                return trial.config
            if spills(trial):
                spilling.add(registers_of(config))
    raise SystemExit(f"{choice}: no candidate that the compiler accepts; add smaller ones")


def write(chosen: dict[Choice, BlockSizes]) -> None:
    """Writes these tiles into kernels/block_size_table.py; its other lines stay."""
    text = TABLE_FILE.read_text(encoding="utf-8")
    entries = {choice.entry: list(aot.TABLE[choice.entry]) for choice in chosen}
    for choice, config in chosen.items():
        entries[choice.entry][SIZES[choice.size]] = written(config)
    for entry, sizes in entries.items():
        key, value = (repr(part).replace("'", '"') for part in (entry, tuple(sizes)))
        text, found = re.subn(rf"^    {re.escape(key)}: .*$", f"    {key}: {value},", text, flags=re.MULTILINE)
        if found != 1:
            raise SystemExit(f"{TABLE_FILE}: {found} lines of {key}")
    TABLE_FILE.write_text(text, encoding="utf-8")
    print(f"{len(chosen)} tiles written to {TABLE_FILE.name}; `make aot` adds them to aot.csv")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernel", action="append", choices=block_sizes.WIDTHS, help="may be given again; default: all"
    )
    parser.add_argument("--kind", action="append", choices=block_sizes.MATH_MODES, help="likewise")
    widths = sorted({width for known in block_sizes.WIDTHS.values() for width in known})
    parser.add_argument("--width", action="append", type=int, choices=widths, help="likewise")
    parser.add_argument("--size", action="append", choices=SIZES, help="likewise")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing one tile's candidates")
    parser.add_argument("--most", type=int, default=20, help="candidates beside the shipped one")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile; default: all cores")
    parser.add_argument("--output", type=Path, help="file of JSON lines to append a row of each candidate to")
    parser.add_argument("--write", action="store_true", help="change kernels/block_size_table.py")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: all but the timing")
    parser.add_argument("--arch", type=int, nargs="*", choices=block_sizes.ARCHITECTURES, help="dry run: default all")
    options = parser.parse_args(arguments)
    if options.arch and not options.dry_run:
        parser.error("--arch goes with --dry-run: the GPU's own is timed")
    return options


def main(arguments: list[str]) -> int:
    aot.refuse_the_interpreter()
    options = parsed(arguments)
    if options.dry_run:
        archs = options.arch or block_sizes.ARCHITECTURES
    elif torch.cuda.is_available():
        archs = (block_sizes.processor(torch.device("cuda")).arch,)
    else:
        raise SystemExit("no CUDA device here: timing needs one; --dry-run does all else")
    wanted = choices(archs, options.kernel or (), options.kind or (), options.width or (), options.size or ())
    if not wanted:
        raise SystemExit("the table has no such entry")
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        if options.dry_run and options.write:
            write(dict(zip(wanted, pool.map(first_accepted, wanted), strict=True)))
            return 0
        chosen = {}
        for choice in wanted:
            trials = explore(choice, options.most, pool, options.processes)
            taken = [] if options.dry_run else timed(choice, trials, options.seconds)
            untimed = len(trials) - len(taken)
            found = [row(choice, *pair) for pair in zip(trials, [*taken, *[[]] * untimed], strict=True)]
            append(options.output, found, options.dry_run)
            print(f"\n{choice}\n{table(found)}", flush=True)
            if not options.dry_run:
                print(f"not timed, as {options.seconds:g} s did not suffice: {untimed} of {len(trials)}", flush=True)
                if (quicker := best(found)) is not None:
                    chosen[choice] = quicker
    for choice, config in chosen.items():
        print(f"{choice}: {written(config)} beats {written(choice.shipped)}")
    if options.write and chosen:
        write(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
