"""What bench/kernels/tune.py tries, strikes out and chooses; nothing is timed here without a GPU."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import tune

ROOT = Path(__file__).parents[2]


@pytest.fixture
def choice() -> Any:
    return tune.Choice("forward", 90, "half", 128, "large")


@pytest.fixture
def outcome() -> Callable[..., Any]:
    def make(registers: int = 255, shared: int = 66_000, stack: int = 0) -> Any:
        return tune.aot.Outcome(registers, stack, 0, shared, 1, 0, 0)

    return make


def test_flags_choose_the_tiles() -> None:
    one = tune.choices([90], ["forward"], ["half"], [128], ["large"])
    assert one == [("forward", 90, "half", 128, "large")]
    assert one[0].shipped == tune.BlockSizes(*tune.aot.TABLE["forward", 90, "half", 128][0])
    assert len(tune.choices(tune.block_sizes.ARCHITECTURES)) == 2 * len(tune.aot.TABLE)
    assert {found.kernel for found in tune.choices([90], ["forward", "dlogits"])} == {"forward", "dlogits"}
    assert {found.size for found in tune.choices([80, 90], sizes=["small"])} == {"small"}
    assert not tune.choices([75], kinds=["tf32"])

    options = tune.parsed(["--kernel", "forward", "--kernel", "dlogits", "--width", "128", "--seconds", "5"])
    assert (options.kernel, options.width, options.kind, options.seconds) == (["forward", "dlogits"], [128], None, 5)
    with pytest.raises(SystemExit):
        tune.parsed(["--arch", "90"])


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (255, 131_072, 8, 1),
        (128, 98_304, 8, 2),
        (127, 66_000, 4, 3),  # by shared memory
        (160, 1_000, 4, 3),
        (161, 1_000, 4, 3),  # 168 are given out
        (169, 1_000, 4, 2),
        (16, 0, 8, 8),  # by warps
    ],
)
def test_programs_of_a_multiprocessor(
    outcome: Callable[..., Any], registers: int, shared: int, warps: int, programs: int
) -> None:
    assert outcome(registers, shared).programs(90, warps) == programs


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "limits"),
    [
        (255, 131_072, 8, []),  # shared memory holds no second program
        (255, 98_304, 8, [128]),
        (255, 66_000, 4, [168]),
        (127, 66_000, 4, []),  # three programs already
        (255, 50_000, 4, [168, 128]),
    ],
)
def test_limits_of_registers_are_those_that_make_room(
    outcome: Callable[..., Any], registers: int, shared: int, warps: int, limits: list[int]
) -> None:
    config = tune.BlockSizes(128, 128, 64, warps, 2, 1)
    unlimited = outcome(registers, shared)
    found = list(tune.limited(config, unlimited, 90))
    assert found == [config._replace(maxnreg=limit) for limit in limits]
    held = unlimited.programs(90, warps)
    for limit in limits:
        assert outcome(limit, shared).programs(90, warps) == held + 1
        assert outcome(limit + 1, shared).programs(90, warps) == held  # a higher limit would not do
        held += 1


def test_candidates_differ_and_leave_the_limits_to_the_compilers_counts() -> None:
    for choice in tune.choices(tune.block_sizes.ARCHITECTURES):
        found = list(tune.candidates(choice))
        assert len(set(found)) == len(found)
        assert {config.maxnreg for config in found} == {None}
        if choice.kernel == "backward":
            assert all(config.depth >= choice.width for config in found)


def test_the_best_of_each_tile_comes_first(outcome: Callable[..., Any]) -> None:
    wide, narrow = tune.BlockSizes(128, 128, 64, 8, 3, 1), tune.BlockSizes(64, 64, 64, 4, 3, 1)
    trials = [
        tune.Trial(wide, outcome(255, 98_304)),  # 1 program
        tune.Trial(wide._replace(stages=2), outcome(255, 66_000)),  # 1
        tune.Trial(wide._replace(maxnreg=128), outcome(128, 98_304)),  # 2
        tune.Trial(narrow, outcome(127, 66_000)),  # 3
        tune.Trial(narrow._replace(depth=32), outcome(127, 66_000)),  # 3
    ]
    in_order = [trials.index(trial) for trial in tune.in_order(reversed(trials), 90)]
    assert in_order == [2, 3, 0, 4, 1]


def _compiler(outcome: Callable[..., Any], compiled: list[Any]) -> Callable[[Any], Any]:
    """Large tiles take 255 registers and do not spill at 128; those of 128×64 with 4 warps spill as they are."""

    def compile_case(case: Any) -> Any:
        compiled.append(case.config)
        rows, keys, depth, warps, stages, _, limit = case.config
        shared = 2 * depth * (rows + keys * stages)
        if (rows, keys, warps) == (128, 64, 4):
            return outcome(255, shared, stack=200)
        wanted = 255 if rows == 128 else 127
        spilled = 0 if limit is None or limit >= 128 or limit >= wanted else 24
        return outcome(min(wanted, limit or 255), shared, stack=spilled)

    return compile_case


def test_exploring_strikes_out_spills_and_puts_the_shipped_tile_first(
    choice: Any, outcome: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(tune.aot, "compile_case", _compiler(outcome, compiled))
    with ThreadPoolExecutor(1) as pool:
        first, *others = tune.explore(choice, 12, pool, 1)
    found = [tune.uncompiled(trial.config) for trial in others]
    assert tune.uncompiled(first.config) == tune.uncompiled(choice.shipped)
    assert len(set(found)) == len(found) == 12
    assert tune.uncompiled(choice.shipped) not in found
    assert all(trial.config.programs == trial.outcome.programs(90, trial.config.warps) for trial in (first, *others))
    assert all(trial.outcome.fits(90) for trial in others)
    assert any(config.maxnreg == 128 for config in found)
    spilling = [config for config in compiled if tune.tile_of(config) == (128, 64, 4)]
    assert len(spilling) == len({tune.registers_of(config) for config in spilling})  # at one depth of pipeline only


class Clock:
    """Time passes only where something takes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def timer(self, to_make: float, to_run: float) -> Callable[[], Callable[[], float]]:
        def run() -> float:
            self.now += to_run
            return to_run

        def make() -> Callable[[], float]:
            self.now += to_make
            return run

        return make


def test_rounds_end_with_the_budget() -> None:
    clock = Clock()
    taken = tune.in_rounds([clock.timer(2.0, 0.5), clock.timer(2.0, 1.5)], 20.0, clock)
    assert taken == [[0.5] * 8, [1.5] * 8]
    assert clock.now == 20.0


def test_rounds_end_when_there_are_enough() -> None:
    clock = Clock()
    (taken,) = tune.in_rounds([clock.timer(0.1, 0.001)], 60.0, clock)
    assert len(taken) == tune.ROUNDS[1]


def test_candidates_beyond_the_budget_are_left_out() -> None:
    clock = Clock()
    taken = tune.in_rounds([clock.timer(2.0, 1.0)] * 10, 20.0, clock)
    assert taken == [[1.0] * 4] * 3
    clock = Clock()
    assert tune.in_rounds([clock.timer(90.0, 30.0)] * 2, 60.0, clock) == [[30.0] * 3]  # the shipped one, in any case


def _row(choice: Any, outcome: Callable[..., Any], config: Any, microseconds: list[float]) -> Any:
    return tune.row(choice, tune.Trial(config, outcome()), [1e-6 * taken for taken in microseconds])


def test_the_best_must_beat_the_shipped_one_beyond_the_spread(choice: Any, outcome: Callable[..., Any]) -> None:
    other = tune.BlockSizes(64, 64, 128, 4, 3, 3, 168)
    shipped = _row(choice, outcome, choice.shipped, [100, 101, 102, 103, 104])
    assert (shipped["shipped"], shipped["rounds"]) == (True, 5)
    assert shipped["microseconds"] == pytest.approx(102)
    assert shipped["microseconds_p20"] == pytest.approx(100.8)
    assert shipped["microseconds_p80"] == pytest.approx(103.2)

    quicker = _row(choice, outcome, other, [90, 91, 92, 93, 94, 150])
    hardly = _row(choice, outcome, other, [97, 98, 99, 101, 102])
    untimed = _row(choice, outcome, other, [])
    assert tune.best([shipped, untimed, quicker]) == other
    assert tune.best([shipped, hardly]) is None
    assert tune.best([shipped, untimed]) is None
    assert "64, 64, 128, 4, 3, 3, 168" in tune.table([shipped, untimed, quicker])


def test_writing_changes_that_tile_and_nothing_else(
    choice: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tune.TABLE_FILE.read_text(encoding="utf-8")
    copy = tmp_path / "table.py"
    copy.write_text(before, encoding="utf-8")
    monkeypatch.setattr(tune, "TABLE_FILE", copy)

    tune.write({choice: choice.shipped})
    assert copy.read_text(encoding="utf-8") == before

    config = tune.BlockSizes(64, 64, 128, 4, 3, 3, 168)
    tune.write({choice: config, choice._replace(kernel="backward", size="small"): config._replace(maxnreg=None)})
    expected = dict(tune.aot.TABLE)
    for key, place in ((choice.entry, 0), (("backward", *choice.entry[1:]), 1)):
        sizes = list(expected[key])
        sizes[place] = (64, 64, 128, 4, 3, 3, 168) if place == 0 else (64, 64, 128, 4, 3, 3)
        expected[key] = tuple(sizes)
    assert runpy.run_path(str(copy))["TABLE"] == expected
    lines = zip(before.splitlines(), copy.read_text(encoding="utf-8").splitlines(), strict=True)
    assert sum(old != new for old, new in lines) == 2


def test_a_dry_run_does_all_but_the_timing(
    choice: Any, outcome: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune.aot, "compile_case", _compiler(outcome, []))
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    output = tmp_path / "rows.jsonl"
    flags = ["--dry-run", "--arch", "90", "--kernel", "forward", "--kind", "half", "--width", "128", "--size", "large"]
    assert tune.main([*flags, "--most", "2", "--processes", "2", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["shipped"] for row in rows] == [True, False, False]
    assert [row["rounds"] for row in rows] == [0, 0, 0]
    assert all(row["dry_run"] and "microseconds" not in row for row in rows)
    assert tuple(rows[0]["config"]) == tune.written(choice.shipped._replace(programs=2))  # by the compiler's count
    assert (rows[0]["kernel"], rows[0]["arch"], rows[0]["size"]) == ("forward", 90, "large")


def test_without_times_the_largest_tile_that_does_not_spill_is_written(
    choice: Any, outcome: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_case(case: Any) -> Any:
        compiled.append(case.config)
        return outcome(stack=8 if case.config.warps == 8 else 0)

    copy = tmp_path / "table.py"
    copy.write_text(tune.TABLE_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune.aot, "compile_case", compile_case)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    monkeypatch.setattr(tune, "TABLE_FILE", copy)
    flags = ["--arch", "90", "--kernel", "forward", "--kind", "half", "--width", "128", "--size", "large"]
    assert tune.main(["--dry-run", "--write", "--processes", "1", *flags]) == 0
    shipped = tune.aot.TABLE[choice.entry]
    assert runpy.run_path(str(copy))["TABLE"][choice.entry] == ((128, 64, 128, 4, 3, 2), *shipped[1:])
    spilling = [config for config in compiled if config.warps == 8]
    assert len(spilling) == len({tune.registers_of(config) for config in spilling}) == 8  # two tiles, four depths


COMPILED_AND_LAUNCHED = """
import sys
from contextlib import suppress
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import get_cache_key, make_backend
from triton.runtime import driver

class Driver:  # of a GPU that is not there
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def note(source, target, options):
    backend = make_backend(target)
    keys.append((source.fn.__name__, get_cache_key(source, backend, backend.parse_options(dict(options)), {})))

driver.set_active(Driver())
triton.compile = triton.compiler.compile = note  # nothing comes of it, so nothing is launched either
sys.path.append(sys.argv[1])
from bench.kernels import tune

tune.block_sizes.processor = lambda device: tune.block_sizes.Processor(90, 132)
for choice in tune.choices([90], kinds=("half", "tf32"), widths=(128, 2048), sizes=("small",)):
    torch.set_float32_matmul_precision("high")
    keys = []
    run = tune.pass_of(choice, torch.device("cpu"))
    for config in (choice.shipped, choice.shipped._replace(maxnreg=128)):
        with suppress(AttributeError):
            tune.compiled(choice, config)
        (compiled,) = keys[-1:]
        keys = []
        with tune.every_launch_takes(choice.kernel, config):
            run()
        launched = {key for name, key in keys if name == compiled[0]}
        assert launched == {compiled[1]}, (choice, launched, compiled)
        print(choice)
"""


def test_what_is_compiled_ahead_is_what_a_launch_looks_for() -> None:
    """The same key of Triton's cache, so that no timing waits for the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_AND_LAUNCHED, str(ROOT)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timing_takes_turns_and_compiles_nothing() -> None:
    device = torch.device("cuda")
    arch = tune.block_sizes.processor(device).arch
    major, minor = torch.cuda.get_device_capability(device)
    if arch != 10 * major + minor:
        pytest.skip("compiled ahead for the newest architecture that the table knows, which this is not")
    candidates = tune.block_sizes.candidates
    choice = tune.Choice("forward", arch, "half", 64, "small")
    trials = [
        tune.compiled(choice, config) for config in (choice.shipped, choice.shipped._replace(stages=1, maxnreg=128))
    ]
    found: list[tuple[str, bool]] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found.append((src.name, cache_hit))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune.triton.knobs.compilation, "listener", listen)
        taken = tune.timed(choice, trials, seconds=5.0)
    assert len(taken) == 2
    assert len(taken[0]) == len(taken[1]) >= tune.ROUNDS[0]
    assert min(map(min, taken)) > 0
    assert {hit for name, hit in found if name == "forward_kernel"} == {True}
    assert tune.block_sizes.candidates is candidates


def test_candidates_divide_what_rows_are_padded_to() -> None:
    for choice in tune.choices(tune.block_sizes.ARCHITECTURES):
        for config in tune.candidates(choice):
            assert tune.block_sizes.ALIGNMENT % config.rows == tune.block_sizes.ALIGNMENT % config.keys == 0, config
