"""The rule of the house: what may import what, who may end the program, and how large things may grow.

A list of exceptions may only shrink: an entry that is no longer needed, or that has become smaller, fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room imports those above it in this list. "commands" are the files that people start.
ROOMS = (
    *("options", "config", "runtime", "data", "views", "network", "rundir", "loaders", "loop", "report"),
    *("inference", "jobs", "experiments", "commands"),
)
COMMANDS = ("run", "verify", "second_stage", "sweep", "reproduce")
EARLIER_NAMES = ("trained",)  # of modules that have moved; nothing imports them

# Statements `raise SystemExit` outside the commands, which alone are to end the program.
EXITS = {
    "train/config.py": 5,
    "train/data/scan.py": 1,
    "train/experiments/job_queue.py": 1,
    "train/experiments/pictures.py": 1,
    "train/experiments/plan.py": 2,
    "train/experiments/runs.py": 1,
    "train/inference.py": 1,
    "train/jobs/second_stage.py": 8,
    "train/jobs/train.py": 8,
    "train/jobs/verify.py": 3,
    "train/loaders/build.py": 2,
    "train/loop/cuda_graph.py": 1,
    "train/loop/training.py": 4,
    "train/network/models.py": 2,
    "train/network/parallel.py": 1,
    "train/rundir/checkpoints.py": 3,
    "train/runtime/distributed.py": 2,
    "train/runtime/machine.py": 4,
}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS, LONGEST_README = 400, 60, 8, 150
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS = {"rcl_fast/functional.py contrastive_loss": 81}  # half of it the docstring
MANY_PARAMETERS = {
    "kernels/pack.py pack": 9,
    "kernels/passes.py backward": 12,
    "kernels/passes.py forward": 10,
    "rcl_fast/functional.py _checked_batch": 10,
    "rcl_fast/functional.py contrastive_loss": 13,  # the call that people write, all but two by name
    "train/loaders/base.py training_reading": 9,
}
README_LINES = 293


@cache
def sources() -> dict[Path, ast.Module]:
    """Every module of the three packages, by its path from the root."""
    paths = sorted(path for folder in ("kernels", "rcl_fast", "train") for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names that a module imports, anywhere in it; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(parts: tuple[str, ...]) -> str:
    """The room of a module, of the parts of its name below rcl_fast.train."""
    return "commands" if parts[0] in COMMANDS else parts[0]


def of_train(names: Iterator[str]) -> Iterator[tuple[str, ...]]:
    for name in names:
        if name.startswith("rcl_fast.train."):
            yield tuple(name.split(".")[2:])


def test_the_kernels_import_nothing_of_the_library() -> None:
    for path, tree in sources().items():
        if path.parts[0] == "kernels":
            ours = {name for name in imports(tree) if name.startswith("rcl_fast")}
            assert all(name.startswith("rcl_fast.kernels.") for name in ours), (path, ours)


def test_the_library_imports_nothing_of_the_trainer() -> None:
    for path, tree in sources().items():
        if path.parts[0] == "rcl_fast":
            assert not [name for name in imports(tree) if name.startswith("rcl_fast.train")], path


def test_every_module_of_the_trainer_is_in_a_room() -> None:
    found = {path.relative_to("train").with_suffix("").parts for path in sources() if path.parts[0] == "train"}
    assert {room(parts) for parts in found} - {"__init__", *EARLIER_NAMES} == set(ROOMS)


def test_rooms_import_downwards_only() -> None:
    below = {lower: number for number, lower in enumerate(ROOMS)}
    for path, tree in sources().items():
        here = path.relative_to("train").with_suffix("").parts if path.parts[0] == "train" else ("__init__",)
        if here[0] in ("__init__", *EARLIER_NAMES):
            continue
        for there in of_train(imports(tree)):
            assert room(there) == room(here) or below[room(there)] < below[room(here)], (path, there)


def test_no_command_imports_another() -> None:
    for path, tree in sources().items():
        if path.parts[0] == "train" and path.stem in COMMANDS and len(path.parts) == 2:
            assert not [there for there in of_train(imports(tree)) if there[0] in COMMANDS], path


def test_only_commands_end_the_program() -> None:
    found = {
        str(path): count
        for path, tree in sources().items()
        if not (len(path.parts) == 2 and path.stem in COMMANDS)
        and (count := sum(map(ends_the_program, ast.walk(tree))))
    }
    assert found == EXITS


def ends_the_program(node: ast.AST) -> bool:
    """Whether it raises SystemExit, or makes one for others to raise, or calls sys.exit."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("SystemExit", "sys.exit", "exit", "quit")
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id == "SystemExit"


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path} {node.name}", node


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def is_operator(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A custom operator of PyTorch, or what stands in for it without values: their signatures are flat."""
    kinds = ("torch.library.", ".register_fake")
    return any(kind in ast.unparse(decorator) for decorator in function.decorator_list for kind in kinds)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many it has, self and cls aside."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) - (bool(named) and named[0].arg in ("self", "cls"))


def test_files_of_the_trainer_are_short() -> None:
    lengths = {
        str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in sources()
        if path.parts[0] == "train"
    }
    assert {path: length for path, length in lengths.items() if length >= LONGEST_FILE} == LONG_FILES


def test_functions_are_short() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions() if not is_kernel(node)}
    assert {name: length for name, length in lengths.items() if length >= LONGEST_FUNCTION} == LONG_FUNCTIONS


def test_functions_have_few_parameters() -> None:
    counts = {
        name: parameters(node)
        for name, node in functions()
        if not (is_kernel(node) or is_operator(node) or node.name == "__init__")
    }
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == MANY_PARAMETERS


def test_the_readme_is_short() -> None:
    length = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_README or length == README_LINES, "the exception may only shrink: write the new length"


@pytest.mark.parametrize(
    "given", ["raise SystemExit", "raise SystemExit('no')", "error = SystemExit(3)", "sys.exit(2)"]
)
def test_each_way_to_end_the_program_is_seen(given: str) -> None:
    assert sum(map(ends_the_program, ast.walk(ast.parse(given)))) == 1
