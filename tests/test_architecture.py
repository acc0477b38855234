"""The rule of the house: what may import what, who may end the program, and how large things may grow.

A list of exceptions may only shrink: an entry that is no longer needed, or that has become smaller, fails too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "rcl_fast", "train")

# A room imports those before it in this list. "commands" are the files that people start.
ROOMS = (
    *("errors", "options", "arguments", "checks", "config", "runtime", "data", "views", "network", "rundir"),
    *("loaders", "loop", "report", "inference", "jobs", "experiments", "command_line", "commands"),
)
COMMANDS = ("run", "verify", "second_stage", "sweep", "reproduce")
EARLIER_NAMES = ("trained",)  # of modules that have moved; nothing imports them
BY_ONE_NAME = "__main__"  # `python -m rcl_fast.train COMMAND`, which alone imports all commands

# How often a module outside the commands, which alone are to end the program, names a way to end it. Two may: what all
# commands share, and the parser of their options, which prints a command's help.
EXITS = {"train/command_line.py": 2, "train/arguments/parsing.py": 1}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS, LONGEST_README = 400, 60, 8, 150
LONG_FUNCTIONS = {"rcl_fast/functional.py contrastive_loss": 87}  # most of it the docstring
MANY_PARAMETERS = {
    "rcl_fast/functional.py contrastive_loss": 16,  # the call that people write, all but two by name
    "rcl_fast/losses.py ContrastiveLoss.__init__": 11,  # the same, all but one by name
    "rcl_fast/functional.py _checked_batch": 10,  # the same arguments, before there is a batch to hold them
    "train/loaders/base.py training_spec": 9,  # all but three by name, four with defaults
}

WAYS_AROUND = ("__import__", "exec", "eval")  # an import statement

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def sources() -> dict[Path, ast.Module]:
    """Every module of the three packages, by its path from the root."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def of_package(package: str) -> Iterator[tuple[Path, ast.Module]]:
    return ((path, tree) for path, tree in sources().items() if path.parts[0] == package)


def is_command(path: Path) -> bool:
    return path.parent == Path("train") and path.stem in COMMANDS


def imports(tree: ast.AST) -> set[str]:
    """The dotted names that a module imports, anywhere in it; `from a import b` is a.b, `from .a import b` .a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names}
    return found


def hidden_imports(tree: ast.AST) -> set[str]:
    """Ways to our modules that `imports` does not tell apart, or does not see."""
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found = {f"import {name}" for name in plain if name.split(".")[0] == "rcl_fast"}
    names = imports(tree)
    tops = {
        "",
        "kernels",
        "train",
        "bench",
        "tests",
        "importlib",
        "pkgutil",
        "runpy",
        *ROOMS,
        *COMMANDS,
        *EARLIER_NAMES,
    }
    found |= {name for name in names if name.split(".")[0] in tops}  # "": relative
    found -= {"importlib.resources", "importlib.util.find_spec", "importlib.metadata"}
    found |= names & {"rcl_fast.train", "rcl_fast.kernels"}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in WAYS_AROUND}
    found |= {
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "modules"
    } & {"sys.modules"}
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return found | {text for text in texts if re.fullmatch(r"rcl_fast\.(train|kernels)(\.\w+)+(:\w+)?", text)}


def rooms_imported(tree: ast.AST) -> dict[str, str]:
    """{room: an import of it}."""
    below = (name for name in imports(tree) if name.startswith("rcl_fast.train."))
    return {room(name.split(".")[2]): name for name in below}


def room(name: str) -> str:
    """The room of a module or folder right below train/."""
    return "commands" if name in COMMANDS else name


def test_imports_are_absolute_and_say_which_module_they_take() -> None:
    found = {str(path): hidden for path, tree in sources().items() if (hidden := hidden_imports(tree))}
    assert found == {"rcl_fast/__init__.py": {"importlib.import_module"}}  # it loads its own names when asked for them


def test_the_kernels_import_nothing_of_the_library() -> None:
    for path, tree in of_package("kernels"):
        above = {name for name in imports(tree) if name.startswith("rcl_fast")}
        assert all(name.startswith("rcl_fast.kernels.") for name in above), (path, above)


def test_the_library_imports_nothing_of_the_trainer() -> None:
    for path, tree in of_package("rcl_fast"):
        assert not rooms_imported(tree), path


def test_every_module_of_the_trainer_is_in_a_room() -> None:
    found = {room(path.relative_to("train").with_suffix("").parts[0]) for path, _ in of_package("train")}
    assert found == {*ROOMS, "__init__", BY_ONE_NAME, *EARLIER_NAMES}


def test_rooms_import_downwards_only() -> None:
    place = {name: number for number, name in enumerate(ROOMS)}
    for path, tree in of_package("train"):
        here = room(path.relative_to("train").with_suffix("").parts[0])
        for there, name in rooms_imported(tree).items():
            assert there in ROOMS, f"{path} imports {name}: no room of that name"
            assert here != "__init__", f"{path} imports {name}: every other import would wait for it"
            height = place["commands"] + 1 if here in (*EARLIER_NAMES, BY_ONE_NAME) else place[here]
            assert place[there] < height or there == here, f"{path} imports {name}, from above"


def test_no_module_waits_for_itself() -> None:
    """Follows every import, a late one within a function too, also within a room."""
    names = {dotted(path): path for path in sources()}
    needs = {name: modules_imported(sources()[path], set(names)) - {name} for name, path in names.items()}
    while first := {name for name, of in needs.items() if not of}:
        needs = {name: of - first for name, of in needs.items() if name not in first}
    assert not needs


def dotted(path: Path) -> str:
    """The name that a module is imported by."""
    inner = path if path.parts[0] == "rcl_fast" else Path("rcl_fast") / path
    return ".".join(inner.with_suffix("").parts).removesuffix(".__init__")


def modules_imported(tree: ast.Module, names: set[str]) -> set[str]:
    """Those of `names` that a module imports: of `from a import b` a.b, or a where that is no module."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    meant = ((str(node.module), f"{node.module}.{alias.name}") for node in nodes for alias in node.names)
    return names & {inner if inner in names else outer for outer, inner in meant}


def test_no_command_imports_another() -> None:
    for path, tree in of_package("train"):
        assert not is_command(path) or "commands" not in rooms_imported(tree), path


def test_only_commands_end_the_program() -> None:
    of_commands = {Path("train", f"{name}.py") for name in (*COMMANDS, BY_ONE_NAME)}
    counts = {str(path): len(exits(tree)) for path, tree in sources().items() if path not in of_commands}
    assert {path: count for path, count in counts.items() if count} == EXITS


def exits(tree: ast.AST) -> list[str]:
    """Where a module names SystemExit but to catch it, or a function that ends the program."""
    caught = {
        id(name)
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and handler.type is not None
        for name in ast.walk(handler.type)
    }
    named = [
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in ("SystemExit", "exit", "quit") and id(node) not in caught
    ]
    # Whatever the module is called here; a command line's parser ends the program where it does not understand.
    ways = {"exit", "_exit", "abort", "SystemExit", "parse_args", "parse_known_args", "execv", "execvp"}
    parsers = {
        alias.asname or "tyro"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "tyro"
    }
    reached = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        *named,
        *(
            ast.unparse(node)
            for node in reached
            if node.attr in ways or ast.unparse(node) in {f"{name}.cli" for name in parsers}
        ),
        *(name for name in imports(tree) if name.split(".")[-1] in ways or name == "tyro.cli"),
    ]


@pytest.mark.parametrize(
    "given",
    [
        *("raise SystemExit", "raise SystemExit(3)", "error = SystemExit(3)", "sys.exit(2)", "os._exit(1)"),
        *("from sys import exit as leave", "class Stop(SystemExit): ...", "quit()", "s.exit()"),
        *(
            "import tyro\ntyro.cli(Options)",
            "import tyro as t\nt.cli(Options)",
            "parser.parse_args()",
            "os.execv('x', [])",
        ),
    ],
)
def test_each_way_to_end_the_program_is_seen(given: str) -> None:
    assert len(exits(ast.parse(given))) == 1


def test_to_catch_an_exit_is_to_end_nothing() -> None:
    assert not exits(ast.parse("try: ...\nexcept (SystemExit, OSError): ..."))


@pytest.mark.parametrize(
    "given",
    [
        *("import rcl_fast", "import rcl_fast.train.run", "from rcl_fast import train", "from . import tiles"),
        *("from train.options import Config", "import bench.rows", "find_spec('rcl_fast.train.run')"),
        *("import pkgutil", "exec('import jobs')", "sys.modules['x']", "f('rcl_fast.train.run:main')"),
        *("from jobs import train", "import importlib", "from importlib import import_module", "__import__('jobs')"),
    ],
)
def test_each_hidden_import_is_seen(given: str) -> None:
    assert hidden_imports(ast.parse(given))


def functions() -> Iterator[tuple[str, Function]]:
    """Each with its path and its name below the module."""
    for path, tree in sources().items():
        yield from ((f"{path} {name}", function) for name, function in below(tree, ""))


def largest(measure: Callable[[Function], int]) -> dict[str, int]:
    """Of each name, for a getter and its setter have the same."""
    found: dict[str, int] = {}
    for name, function in functions():
        found[name] = max(measure(function), found.get(name, 0))
    return found


def below(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{getattr(node, 'name', '')}"
        if isinstance(node, Function):
            yield name, node
        named = isinstance(node, Function | ast.ClassDef)
        yield from below(node, f"{name}." if named else prefix)


def decorated(function: Function, *kinds: str) -> bool:
    return any(kind in ast.unparse(decorator) for decorator in function.decorator_list for kind in kinds)


def is_kernel(function: Function) -> bool:
    return decorated(function, "triton.jit")


def is_operator(function: Function) -> bool:
    """A custom operator of PyTorch, or what stands in for it without values: their signatures are flat."""
    return decorated(function, "torch.library.", ".register_fake")


def parameters(function: Function) -> int:
    """How many it has, self and cls aside."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    of_its_own = len(named) - (bool(named) and named[0].arg in ("self", "cls"))
    return of_its_own + (given.vararg is not None) + (given.kwarg is not None)


def test_files_are_short() -> None:
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {path: length for path, length in lengths.items() if length >= LONGEST_FILE}


def test_functions_are_short() -> None:
    lengths = largest(lambda node: 0 if is_kernel(node) else (node.end_lineno or 0) - node.lineno + 1)
    assert {name: length for name, length in lengths.items() if length >= LONGEST_FUNCTION} == LONG_FUNCTIONS


def test_functions_have_few_parameters() -> None:
    counts = largest(lambda node: 0 if is_kernel(node) or is_operator(node) else parameters(node))
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == MANY_PARAMETERS


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_contributing_has_the_rooms_in_this_order_and_about_their_lengths() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+(?:\.py|/)`|commands).* \| ([\d,]+) \|$", text, flags=re.MULTILINE)
    assert [name.strip("`").removesuffix(".py").removesuffix("/") for name, _ in rows] == list(ROOMS)
    lines: dict[str, int] = {}
    for path, _ in of_package("train"):
        name = room(path.relative_to("train").with_suffix("").parts[0])
        lines[name] = lines.get(name, 0) + len((ROOT / path).read_text(encoding="utf-8").splitlines())
    for (_, written), name in zip(rows, ROOMS, strict=True):
        assert int(written.replace(",", "")) == pytest.approx(lines[name], rel=0.1), name


def test_contributing_says_about_how_long_each_file_of_the_walk_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = re.findall(r"`([\w/]+\.py)`\s+\((\d+)\)", text)
    assert len(walk) > 20
    for path, written in walk:
        length = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert int(written) == pytest.approx(length, rel=0.1), path
