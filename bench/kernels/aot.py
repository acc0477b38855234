"""Compile every kernel and every entry of the block-size table ahead of time, for every architecture, without a GPU.

    python -m bench.kernels.aot                       # all of it, to bench/results/speed/aot.csv: `make aot`
    python -m bench.kernels.aot --arch 90 --kernel backward --kind half
    python -m bench.kernels.aot --rows FILE           # the cases of these rows again

A row says what the compiler made of one entry: registers, spills (STACK and LOCAL of the cubin's resource usage),
shared memory against the architecture's limit, programs that a multiprocessor holds, the tensor-core instructions in
the PTX, and what a tile takes in the machine code (counts.py). All of it is counted; no time is measured here.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.counts import NOTHING, Counts, Tile, counts_of
from bench.kernels.sass import CUOBJDUMP, disassembly
from rcl_fast.kernels import block_sizes
from rcl_fast.kernels.backward_narrow import backward_kernel
from rcl_fast.kernels.backward_norm import project_kernel
from rcl_fast.kernels.backward_weights import weights_kernel
from rcl_fast.kernels.backward_wide import dlogits_kernel
from rcl_fast.kernels.block_size_table import TABLE
from rcl_fast.kernels.forward import forward_kernel
from rcl_fast.kernels.forward_combine import combine_kernel
from rcl_fast.kernels.pack import pack_kernel

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed" / "aot.csv"
SOURCES = Path(block_sizes.__file__).parent

# Largest shared memory of one block, bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {
    70: 98304, 75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376
}  # fmt: skip
# What a multiprocessor has (same table): 32-bit registers, given to warps in lots of 256, on every architecture; warps.
REGISTERS = 65536
WARPS = {70: 64, 75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}

KERNELS = {
    "prepare": pack_kernel,
    "forward": forward_kernel,
    "combine": combine_kernel,
    "weights": weights_kernel,
    "backward": backward_kernel,
    "dlogits": dlogits_kernel,
    "project": project_kernel,
}
POINTERS = {
    "p_labels": "*i64", "p_extra_labels": "*i64", "p_class_counts": "*i64", "p_key_labels": "*i32",
    "p_histogram": "*i32", "p_compression": "*fp32", "p_vectors": "*fp32", "p_weights": "*fp32", "p_partials": "*fp32",
    "p_parts": "*fp32", "p_loss": "*fp32", "p_lse": "*fp32", "p_grad_output": "*fp32", "p_grad_scale": "*fp32",
}  # fmt: skip
FLOATS = ("root",)
PRODUCTS = {"forward": 1, "backward": 2, "dlogits": 1}  # of a tile, by kernel; others have none


class Case(NamedTuple):
    """One compilation: a kernel with its block sizes, in one of the variants of `cases_of`."""

    kernel: str
    arch: int
    kind: str
    width: int  # bucket of the table
    dtype: str
    K: int
    bounded: bool
    config: block_sizes.BlockSizes

    @property
    def tile(self) -> Tile:
        """Raises KeyError for a kernel without products."""
        rows, keys, depth, warps, *_ = self.config
        size = 2 if self.kind == "half" else 4
        steps = -(-self.K // depth)
        return Tile(rows, keys, depth, steps, PRODUCTS[self.kernel], warps, size, self.kernel == "dlogits")


class Outcome(NamedTuple):
    """What the compiler made of a case."""

    registers: int
    stack: int
    local: int
    shared: int
    wgmma: int | None  # None: not counted
    mma: int | None
    tcgen05: int | None
    error: str = ""
    counts: Counts = NOTHING

    def fits(self, arch: int) -> bool:
        return not self.error and self.stack == 0 and self.local == 0 and self.shared <= SHARED_LIMIT[arch]

    def programs(self, arch: int, warps: int) -> int:
        """Returns how many programs a multiprocessor holds at once, by its registers, shared memory and warps."""
        system = 1024 if arch >= 80 else 0  # shared memory that each block takes for itself, beside its own limit
        return min(
            REGISTERS // (32 * warps * max(8, -(-self.registers // 8) * 8)),
            (SHARED_LIMIT[arch] + system) // max(1, self.shared + system),
            WARPS[arch] // warps,
        )


COLUMNS = (
    *(name for name in Case._fields if name != "config"),
    *block_sizes.BlockSizes._fields,
    *(name for name in Outcome._fields if name != "counts"),
    "resident",
    *Counts._fields,
    "shared_limit",
    "sources",
    "triton",
)


def cases_of(kernel: str, arch: int, math_mode: str, width: int, config: block_sizes.BlockSizes) -> Iterator[Case]:
    """Gives an entry's two extremes: the common case, and all options at once on ragged rows (masks cost registers)."""
    aligned, ragged = ("bf16", "fp16") if math_mode == "half" else ("fp32", "fp32")
    if arch < 80 and math_mode == "half":
        aligned = "fp16"  # no bfloat16 before sm_80
    yield Case(kernel, arch, math_mode, width, aligned, width, True, config)
    yield Case(kernel, arch, math_mode, width, ragged, width - 16, False, config)


def table_cases() -> Iterator[Case]:
    """Gives the cases of every entry of the shipped table."""
    for (kernel, arch, math_mode, width), sizes in TABLE.items():
        for size in dict.fromkeys(sizes):
            yield from cases_of(kernel, arch, math_mode, width, block_sizes.BlockSizes(*size))


def small_cases() -> Iterator[Case]:
    """Gives the cases of the kernels whose block sizes the table does not hold."""
    for arch in block_sizes.ARCHITECTURES:
        for math_mode, width in (("half", 128), ("ieee", 2048)):
            rows_of = {"prepare": 16, "combine": 128, "weights": 128, "project": max(1, 2048 // width)}
            for kernel, rows in rows_of.items():
                depth = min(128, width) if kernel == "prepare" else width
                yield from cases_of(kernel, arch, math_mode, width, block_sizes.BlockSizes(rows, 128, depth, 4, 3, 1))


def benchmark_cases() -> Iterator[Case]:
    """Gives the cases of wide rows that the benchmark launches: 1,024 features, of an entry for up to 2,048."""
    for kernel in ("forward", "dlogits"):
        for size in dict.fromkeys(TABLE[kernel, 90, "half", 2048]):
            yield Case(kernel, 90, "half", 2048, "bf16", 1024, True, block_sizes.BlockSizes(*size))


def case_of(row: Mapping[str, str]) -> Case:
    """Returns the case of a row of results."""
    numbers = [int(row[name]) if row[name] else None for name in block_sizes.BlockSizes._fields]
    config = block_sizes.BlockSizes(*numbers)  # type: ignore[arg-type]  # maxnreg alone may be empty
    arch, width, K = (int(row[name]) for name in ("arch", "width", "K"))
    return Case(row["kernel"], arch, row["kind"], width, row["dtype"], K, row["bounded"] == "True", config)


@cache
def sources() -> str:
    """Returns a hash of the files that have kernels, or what kernels call: rows of another hash are stale.

    The table is not among them: rows say their block sizes.
    """
    texts = {file.name: file.read_bytes() for file in sorted(SOURCES.glob("*.py"))}
    compiled = [name.encode() + text for name, text in texts.items() if b"@triton.jit" in text]
    return hashlib.sha256(b"".join(compiled)).hexdigest()[:16]


def constants(case: Case) -> dict[str, Any]:
    """Returns the kernel's compile-time arguments, with every option that adds work switched on."""
    everything = {
        "D": case.K if case.bounded else case.K - 1,
        "K": case.K,
        "NORMALIZE": True,
        "AVERAGE": True,
        "REBALANCE": True,
        "COMPRESS": not case.bounded,
        "ANCHORS_ARE_KEYS": True,
        "EXTRA": not case.bounded,
        "PROTOTYPES": True,
        "SCAN": case.bounded,
        "EXPONENTS": 126,
        "HEADROOM": 10 if case.dtype == "fp16" else 0,
        "LOAD_ROOT": False,
        "BOUNDED": case.bounded,
        "SCALED": case.dtype == "fp16",
        "LABELS": 128,
        **case.config.constants(case.kind),
    }
    return {name: value for name, value in everything.items() if name in KERNELS[case.kernel].arg_names}


def source(case: Case) -> ASTSource:
    """Returns the kernel as `kernels/` calls it: aligned pointers, and integers that are not specialised.

    A launch of the same variant finds it in Triton's cache, whose key has all of this in it.
    """
    kernel, fixed = KERNELS[case.kernel], constants(case)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[Any]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
            if isinstance(fixed[name], str):
                attributes[(position,)] = []  # of no meaning, but a launch has it too
        elif name.startswith("p_"):
            signature[name] = POINTERS.get(name, "*" + case.dtype)
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if not kernel.params[position].do_not_specialize:  # then it is a multiple of 16 in every launch
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


def compile_case(case: Case) -> Outcome:
    """Compiles one case; a refusal of the compiler is an outcome too, and machine code that can't be counted."""
    try:
        compiled = triton.compile(source(case), target=GPUTarget("cuda", case.arch, 32), options=case.config.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = resource_usage(Path(cubin.name))
            counted = counts_of(disassembly(Path(cubin.name)), case.tile) if case.kernel in PRODUCTS else NOTHING
    except Exception as error:  # the compiler raises many types
        return Outcome(0, 0, 0, 0, 0, 0, 0, error=" ".join(str(error).split())[:200] or type(error).__name__)
    ptx = compiled.asm.get("ptx")  # a cache that has travelled (bench/gpu.py) holds the binary alone

    def count(instruction: str) -> int | None:
        return None if ptx is None else ptx.count(instruction)

    return Outcome(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        wgmma=count("wgmma.mma_async"),
        mma=count("mma.sync"),
        tcgen05=count("tcgen05.mma"),
        counts=counted,
    )


def resource_usage(cubin: Path) -> dict[str, int]:
    """Returns registers and bytes of a thread: REG, STACK, LOCAL."""
    command = (CUOBJDUMP, "--dump-resource-usage", cubin)
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def compile_all(cases: Iterable[Case], processes: int) -> Iterator[tuple[Case, Outcome]]:
    """Gives each case with its outcome, in order. Spawns processes: the compiler's threads do not survive a fork."""
    cases = list(cases)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from zip(cases, pool.map(compile_case, cases, chunksize=4), strict=True)


def row(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Returns a case's row of the results; what was not counted is left empty."""
    fields = {**case._asdict(), **case.config._asdict(), **outcome._asdict()}
    if outcome.counts != NOTHING:
        fields |= {name: round(value, 3) for name, value in outcome.counts._asdict().items()}
    if not outcome.error:
        fields["resident"] = outcome.programs(case.arch, case.config.warps)
    fields |= {"shared_limit": SHARED_LIMIT[case.arch], "sources": sources(), "triton": triton.__version__}
    return {name: fields.get(name) for name in COLUMNS}


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    """Returns the rows of a file of results."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def refuse_the_interpreter() -> None:
    """Raises SystemExit under Triton's interpreter, where kernels are Python functions that nothing compiles."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("kernels are compiled here: run this without TRITON_INTERPRET")


def main(arguments: list[str]) -> int:
    refuse_the_interpreter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=block_sizes.ARCHITECTURES)
    parser.add_argument("--kernel", choices=KERNELS)
    parser.add_argument("--kind", choices=block_sizes.MATH_MODES)
    parser.add_argument("--width", type=int)
    parser.add_argument("--rows", type=Path, help="a file of rows, whose cases are compiled again")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS} for everything, stdout for a part")
    chosen = parser.parse_args(arguments)
    wanted = {name: getattr(chosen, name) for name in ("arch", "kernel", "kind", "width")}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    every = map(case_of, read(chosen.rows)) if chosen.rows else (*table_cases(), *small_cases(), *benchmark_cases())
    cases = [case for case in every if all(getattr(case, name) == value for name, value in wanted.items())]
    out = chosen.out or (None if wanted or chosen.rows else RESULTS)
    bad = 0
    with out.open("w", newline="", encoding="utf-8") if out else os.fdopen(os.dup(1), "w") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case, outcome in compile_all(cases, chosen.processes):
            writer.writerow(row(case, outcome))
            file.flush()  # what is done shows while the rest goes on; a second run finds it in Triton's cache
            if not outcome.fits(case.arch):
                bad += 1
                print(*case, outcome, file=sys.stderr, flush=True)
    print(f"{len(cases)} compiled, {bad} with an error, spills or too much shared memory", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
