"""All that a CUDA GPU can say of the project, part by part, within a budget of seconds that the parts share.

    bench/gpu.sh OUT gate+speed+profile              right, and how fast: parts by name, in this order
    bench/gpu.sh OUT table1 --budget 540             goes on with what is in SCRATCH, and in TRAVEL/runs
    bench/gpu.sh OUT gate+cifar1 --dry-run           any machine: proves the script; its rows say so

A part that is red, late or left out stops no other: it is a row in OUT/parts.jsonl, and the exit status is 1. The rows
of all parts say what the tests said on that machine ("gate"). A part writes its rows as it goes, the most important
first, so that a part that is late has them. OUT gets few files: gate.log, parts.jsonl, PART.jsonl, caches.tar.xz,
runs.tar.gz.

What the parts look at, each a variable of the environment, or else a file of the folder TRAVEL, which bench/travel.sh
fills:
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4
from xml.etree import ElementTree

import torch

from bench import rows

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
MEGABYTE = 2**20
LARGEST_FILE = 16 * MEGABYTE  # of what goes back
LARGEST_LOG = MEGABYTE
CLOSING_SECONDS = 25  # for packing what goes back
SHOWING_SECONDS = 60  # of a table's part, for its rows
FEWEST_SECONDS = 5  # for which no part is started
PASSED = "passed"
STOPPED = "late: the call was stopped"
EARLIER = ", in an earlier call"
TESTS = ("gate", "captured")  # the parts whose word stands in every row

TRAINER = ("tyro", "rich", "tensorboard", "plotly", "jinja2", "timm", "torchvision", "sklearn")

INPUTS = {
    "BCL": ("bcl.py", "loss/contrastive.py of BCL's repository: published code to compare with"),
    "SUPCONTRAST": ("supcontrast.py", "losses.py of SupContrast's"),
    "CIFAR100": ("cifar100_lt.tar", "cifar100_lt: a folder as train/run.py takes it, or a file of bench/pack.py"),
    "CIFAR10": ("cifar10_lt.tar", "cifar10_lt, likewise"),
    "JPEGS": ("jpegs", "folder of JPEG files below class folders; without it images are made up"),
    "RUNS": (
        "runs",
        "folder of TABLE.jsonl and runs.tar.gz that earlier calls wrote: table1 and others go on from them",
    ),
    "CACHES": ("caches.tar.xz", "what an earlier call compiled"),
    "DALI": ("dali", "folder of DALI's wheels, for a machine that lacks it"),
}


class Command(NamedTuple):
    """A process of a part."""

    arguments: list[str]
    folder: Path = ROOT  # where it runs
    log: Path | None = None  # where its output goes; None: here
    reserve: float = 0  # seconds of its part that are for the commands behind it; it may take all others
    # How it is asked to end, and for how long. SIGINT goes to the one process, whose workers it ends; SIGTERM to all.
    stop: signal.Signals = signal.SIGTERM
    grace: float = 5


class Call(NamedTuple):
    """What all parts of a call share."""

    out: Path
    scratch: Path
    inputs: dict[str, Path]  # those of INPUTS that are there
    dry_run: bool
    ends: float  # time.monotonic() at which the budget is spent

    @property
    def dry(self) -> list[str]:
        return ["--dry-run"] if self.dry_run else []

    def left(self) -> float:
        """Returns the seconds that are left of the budget, without those that packing takes."""
        return self.ends - CLOSING_SECONDS - time.monotonic()


Commands = Generator[Command, str, str | None]
"""Yields commands, gets what became of each ("passed", "red: ...", "late: ..."); may return what became of all."""


class Part(NamedTuple):
    """Something that is measured or tested by itself."""

    seconds: int  # at most
    about: str
    commands: Callable[[Call], Commands]
    needs: tuple[str, ...] = ()  # packages
    data: str | None = None  # the one of INPUTS without which it says nothing


def gate(call: Call) -> Commands:
    """Runs the tests of the loss and the kernels, compiled for this GPU."""
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        print("no pytest and hypothesis here: the shipped configurations only", flush=True)
        if not call.dry_run:
            yield python("tests/kernels/shipped.py")
        return None
    return (yield from tests(call, "gate", "tests/rcl_fast", "tests/kernels"))


def captured(call: Call) -> Commands:
    """Runs the tests that need a GPU of the trainer (CUDA-graph steps, compiled views) and of bench/kernels/tune.py."""
    where = ["tests/train/loop/test_cuda_graph.py", "tests/bench/test_tune.py"]
    return (yield from tests(call, "captured", "-m", "gpu", *where))


def tests(call: Call, name: str, *arguments: str) -> Commands:
    """Runs pytest on as many processes as there are cores, up to 16, as compilation takes most of the time."""
    report, log = call.scratch / f"{name}.xml", call.out / f"{name}.log"
    report.unlink(missing_ok=True)
    spread = ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"] if find_spec("xdist") else []
    how = ["--collect-only"] if call.dry_run else spread
    there = [str(ROOT / argument) if argument.startswith("tests/") else argument for argument in arguments]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *how, *there]
    # Python looks into the current folder first, and ROOT/rcl_fast lacks the kernels.
    status = yield Command(command, folder=call.scratch / "import", log=log, stop=signal.SIGINT, grace=25)
    shorten(log)
    print(*important_lines(log), sep="\n", flush=True)
    return status if call.dry_run else verdict(status, report)


def verdict(status: str, report: Path) -> str:
    """Returns what a JUnit report says of the tests; `status` is how their process ended."""
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = [
            {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")} for suite in suites
        ]
    except (OSError, ElementTree.ParseError):
        counts = []
    if not counts:
        return "red: no report" if status == PASSED else status
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    ran, failed = total["tests"] - total["skipped"], total["failures"] + total["errors"]
    if failed:
        return f"red: {failed} of {ran}" + (f", {status}" if status.startswith("late") else "")
    return f"{status}: {ran} tests" if status == PASSED else f"{status}, {ran} tests passed before"


def important_lines(log: Path) -> list[str]:
    """Returns the failures, the errors and the last line of a log of pytest."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:60] + lines[-1:]


def shorten(log: Path) -> None:
    """Cuts a log that is larger than LARGEST_LOG down to its end."""
    content = log.read_bytes()
    if len(content) > LARGEST_LOG:
        log.write_bytes(b"(the beginning is left out)\n" + content[-LARGEST_LOG:])


def loss(call: Call, part: str, *arguments: str) -> Command:
    peers = flags(call, {"BCL": "--bcl", "SUPCONTRAST": "--supcontrast"})
    output = ["--output", str(call.out / f"{part}.jsonl")]
    return module("bench.loss.gpu", part, *output, *peers, *arguments, *call.dry)


def speed(call: Call) -> Commands:
    """Times each backend and published code, case by case."""
    yield loss(call, "speed", "--seconds", "2")
    return None


def largest(call: Call) -> Commands:
    """Times the loss at a million anchors."""
    yield loss(call, "speed", "--seconds", "2", "--case", "largest")
    return None


def profile(call: Call) -> Commands:
    """Times each kernel of the loss."""
    yield loss(call, "profile")
    return None


def memory(call: Call) -> Commands:
    """Measures the memory that each backend takes."""
    yield loss(call, "memory")
    return None


def cifar_runs(call: Call, *arguments: str, keep: Path | None = None) -> Command:
    more = [] if keep is None else ["--keep", str(keep)]
    output = ["--output", str(call.out / "cifar.jsonl")]
    source = [] if call.dry_run else flags(call, {"CIFAR100": "--data"})
    command = module("bench.training.cifar", *source, *arguments, *output, *more, *call.dry)
    return command._replace(grace=30)  # a run saves itself


def cifar1(call: Call) -> Commands:
    """Trains once for 200 epochs; where the CUDA graph fails, 20 epochs step by step still tell the speed."""
    kept = call.scratch / "cifar1"
    shutil.rmtree(kept, ignore_errors=True)
    status = yield cifar_runs(call, "--ways", "graph", "--seeds", "1", keep=kept)
    if status.startswith("red"):
        yield cifar_runs(call, "--ways", "plain", "--seeds", "1", "--epochs", "20", keep=kept)
    for log in sorted(kept.glob("*.log")):
        if status != PASSED:
            shutil.copy(log, call.out)
        curve = log.with_suffix("") / "metrics.jsonl"
        if curve.is_file():  # a run may fail before its first epoch ends
            rows.append(call.out / f"curve-{log.stem}.jsonl", rows.read(curve), call.dry_run)
    return status


def cifar(call: Call) -> Commands:
    """Times the ways to take a step against each other, then several runs at once, then the training step alone."""
    yield cifar_runs(call, "--ways", "plain", "graph", "graph_compiled", "--seeds", "1", "--epochs", "5")
    yield cifar_runs(call, "--ways", "graph_compiled", "--seeds", "1", "--epochs", "20", "--at-once", "1", "3", "6")
    steps = ["--arch", "resnet32", "--rounds", "3", "--workers", str(os.cpu_count())]
    yield module("bench.training.step", *steps, "--output", str(call.out / "cifar_step.jsonl"), *call.dry)
    return None


def reproduced(table: str, dataset: str) -> Callable[[Call], Commands]:
    """Returns the part that runs a table of the paper, as far as time allows, and writes its rows and runs to OUT."""

    def commands(call: Call) -> Commands:
        folder = call.scratch / "runs"
        bring_runs(call, folder)
        known = [text for file in sorted(folder.glob("*.jsonl")) if has_keys(file) for text in ("--rows", str(file))]
        source = flags(call, {"CIFAR100" if dataset == "cifar100_lt" else "CIFAR10": "--data"})
        how = [
            "--jobs-per-device",
            str(jobs_per_device()),
            f"--more={os.environ.get('MORE', '--cuda-graph --compile')}",
        ]
        setting = ["--dataset", dataset, *source, *how]
        if call.dry_run:
            row = "off" if table == "compression" else "BCL+RCL"
            setting = ["--dataset", "digits_lt", "--epochs", "1", "--seeds", "1", "--only", row]
        command = ["train/reproduce.py", table, *setting, "--folder", str(folder), *known]
        # The runs under way save themselves.
        status = yield python(*command)._replace(grace=40, reserve=SHOWING_SECONDS)
        shown = yield python(*command, "--no-run", "--output", str(call.scratch / "tables"))
        if shown == PASSED:
            give_back_rows(call, table)
        else:
            print(f"no rows of {table}: {shown}; its runs are in runs.tar.gz", flush=True)
        pack_runs(folder, call.out)
        return status

    return commands


def bring_runs(call: Call, folder: Path) -> None:
    """Copies rows and unpacks runs of earlier calls into `folder`; runs that are already there stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    came_back = call.inputs.get("RUNS")
    for file in sorted(came_back.iterdir()) if came_back else []:
        if file.suffix == ".jsonl":
            shutil.copy(file, folder)
        elif file.name.startswith("runs"):
            with tarfile.open(file) as archive:
                here = {run.name for run in folder.iterdir()}
                wanted = [member for member in archive if member.name.split("/")[0] not in here]
                archive.extractall(folder, wanted, filter="data")


def has_keys(file: Path) -> bool:
    """Returns whether every row of a file has a key, as the rows of a table do."""
    return all("key" in row for row in rows.read(file))


def give_back_rows(call: Call, table: str) -> None:
    """Writes a table's rows to OUT, each with a description of this call; a row of an earlier call keeps its own."""
    about = {**rows.describe(), "jobs_per_device": jobs_per_device(), **({"dry_run": True} if call.dry_run else {})}
    for file in (call.scratch / "tables").glob(f"{table}*.jsonl"):  # the name says what is not the paper's
        lines = [json.dumps({**about, **row}) + "\n" for row in rows.read(file)]
        (call.out / file.name).write_text("".join(lines), encoding="utf-8")


def jobs_per_device() -> int:
    return int(os.environ.get("JOBS", "3"))


def pack_runs(folder: Path, out: Path) -> None:
    """Packs finished runs, then unfinished ones, the furthest first; prints the names of those that do not fit."""
    room, files, left_out = LARGEST_FILE, [], []
    for run in sorted(folder.glob("*/metrics.jsonl"), key=progress, reverse=True):
        of_run = [file for file in sorted(run.parent.iterdir()) if is_read_again(file, is_finished(run.parent))]
        size = sum(file.stat().st_size for file in of_run)
        if size > room:
            left_out.append(run.parent.name)
            continue
        files += of_run
        room -= size
    if left_out:
        print(f"runs that do not go back, as {LARGEST_FILE // MEGABYTE} MiB do: {', '.join(left_out)}", flush=True)
    if files:
        with tarfile.open(out / "runs.tar.gz", "w:gz", compresslevel=1) as archive:
            for file in files:
                archive.add(file, file.relative_to(folder))


def progress(curve: Path) -> tuple[bool, int]:
    """Returns whether a run has finished, and how many epochs it has."""
    return is_finished(curve.parent), curve.read_bytes().count(b"\n")


def is_finished(run: Path) -> bool:
    from rcl_fast.train.rundir import status  # needs the trainer's packages, which the part has asked for

    return status.read(run) == "finished"


def is_read_again(file: Path, finished: bool) -> bool:
    """Returns whether a later call reads this file: the figures of any run, the checkpoints of an unfinished one."""
    kept = ("config.json", "metrics.json", "metrics.jsonl", "status.json", "provenance.json", "output.log")
    return file.name in kept or (not finished and file.name in ("last.pt", "best.pt"))


def tune(call: Call) -> Commands:
    """Chooses tiles by time for the entries of the large cases, and times these cases before and after."""
    cases = ["--seconds", "2", "--variant", "triton", "--case", "large, narrow", "--case", "large, wide"]
    yield loss(call, "speed", *cases)
    before = (ROOT / "kernels" / "block_size_table.py").read_bytes()
    for kernel, width in (("backward", 128), ("forward", 128), ("dlogits", 2048), ("forward", 2048)):
        entry = ["--kernel", kernel, "--kind", "half", "--width", str(width), "--size", "large"]
        how = ["--most", "2", "--dry-run", "--arch", "90"] if call.dry_run else ["--most", "12", "--write"]
        command = module(
            "bench.kernels.tune", *entry, "--seconds", "25", *how, "--output", str(call.out / "tune.jsonl")
        )
        yield command._replace(reserve=SHOWING_SECONDS)
    if (ROOT / "kernels" / "block_size_table.py").read_bytes() != before:  # from here on this is not the commit's code
        os.environ["RCL_COMMIT"] = f"{rows.describe()['commit']}+tuned"
        shutil.copy(ROOT / "kernels" / "block_size_table.py", call.out / "block_size_table.py")
    yield loss(call, "speed", *cases)
    return None


def data(call: Call) -> Commands:
    """Times the loaders alone, then the trainer with their images and with noise."""
    sources = flags(call, {"CIFAR100": "--cifar", "JPEGS": "--jpegs"})
    for what in ([], ["--train"]):
        more = ["--workers", str(os.cpu_count()), "--output", str(call.out / "data.jsonl")]
        yield module("bench.images.loaders", *what, *sources, *more, *call.dry)
    return None


def step(call: Call) -> Commands:
    """Times the paper's main training beside a plain loop of BCL's kind, at a batch size that every variant holds."""
    source = flags(call, {"JPEGS": "--data"})
    setting = ["--batch-size", "128", "--rounds", "3", "--steps", "5", "--workers", str(os.cpu_count())]
    yield module("bench.training.step", *source, *setting, "--output", str(call.out / "step.jsonl"), *call.dry)
    return None


def dali(call: Call) -> Commands:
    """Tests DALI's views on the GPU against those of the device loader."""
    wheels = sorted(map(str, call.inputs["DALI"].glob("*.whl"))) if "DALI" in call.inputs else []
    if wheels:
        how = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        yield python("-m", "pip", "install", *how, "--target", str(call.scratch / "site"), *wheels)
    if (yield python("-c", "import nvidia.dali")) != PASSED:
        return "left out: no nvidia.dali here (DALI=folder of its wheels brings it)"
    return (yield from tests(call, "dali", "-m", "gpu", "tests/train/loaders/test_dali_on_a_gpu.py"))


def flags(call: Call, names: dict[str, str]) -> list[str]:
    """Returns the options that name the inputs, for those inputs that are there."""
    return [text for name, flag in names.items() if name in call.inputs for text in (flag, str(path_of(call, name)))]


def path_of(call: Call, name: str) -> Path:
    """Returns the path of an input; a file of bench/pack.py is unpacked first, once."""
    given = call.inputs[name]
    if given.suffix != ".tar":
        return given
    folder = call.scratch / given.stem
    if not (folder / f"{given.stem}.npz").is_file():
        subprocess.run([sys.executable, str(BENCH / "pack.py"), "unpack", str(given), str(folder)], check=True)
    return folder


def python(*arguments: str) -> Command:
    return Command([sys.executable, *arguments])


def module(*arguments: str) -> Command:
    return python("-m", *arguments)


PARTS = {
    "gate": Part(220, "tests of the loss and the kernels", gate),
    "captured": Part(120, "the trainer's tests that need a GPU", captured, TRAINER),
    "speed": Part(200, "time of the loss", speed),
    "profile": Part(60, "time of each kernel", profile),
    "memory": Part(80, "memory of the loss", memory),
    "largest": Part(90, "time of the loss at a million anchors", largest),
    "cifar1": Part(330, "one run on CIFAR-100-LT, 200 epochs", cifar1, TRAINER, "CIFAR100"),
    "cifar": Part(400, "ways to take CIFAR's steps, runs at once", cifar, TRAINER, "CIFAR100"),
    "table1": Part(540, "table 1 on CIFAR-100-LT, going on", reproduced("table1", "cifar100_lt"), TRAINER, "CIFAR100"),
    "table2": Part(540, "table 2 on CIFAR-10-LT, going on", reproduced("table2", "cifar10_lt"), TRAINER, "CIFAR10"),
    "compression": Part(540, "compression, going on", reproduced("compression", "cifar100_lt"), TRAINER, "CIFAR100"),
    "tune": Part(400, "tiles by time, the loss before and after", tune),
    "dali": Part(200, "DALI's views on the GPU", dali, TRAINER),
    "data": Part(240, "the loaders", data, TRAINER),
    "step": Part(300, "the whole step of ResNeXt-50", step, TRAINER),
}  # fmt: skip


def run_part(name: str, call: Call) -> rows.Row:
    """Runs a part and returns its row, however the part ended."""
    part = PARTS[name]
    limit = min(part.seconds, call.left())
    row: rows.Row = {"part": name, "limit_seconds": round(max(0, limit)), "seconds": 0.0}
    print(f"\n== {name}: {part.about}; at most {max(0, limit):.0f} s, {call.left():.0f} s are left", flush=True)
    missing = [package for package in part.needs if find_spec(package) is None]
    if missing:
        return {**row, "status": f"left out: no {', '.join(missing)} here (WHEELS=folder brings them)"}
    if part.data and part.data not in call.inputs and not (call.dry_run and "TRAVEL" not in os.environ):
        return {**row, "status": f"left out: no {part.data} here ({INPUTS[part.data][1]})"}
    if limit < FEWEST_SECONDS:
        return {**row, "status": "late: no time was left to start it"}
    began = time.monotonic()
    try:
        status = follow(part.commands(call), began + limit)
    except Exception as error:  # whatever it is, the other parts go on
        traceback.print_exc()
        status = f"red: {type(error).__name__}: {error}"
    return {**row, "status": status, "seconds": round(time.monotonic() - began, 1)}


def follow(commands: Commands, ends: float) -> str:
    """Runs a part's commands; returns the part's own verdict, or else the first status that is not PASSED."""
    statuses: list[str] = []
    try:
        command = next(commands)
        while True:
            statuses.append(run(command, ends - time.monotonic() - command.reserve))
            command = commands.send(statuses[-1])
    except StopIteration as ended:
        word = ended.value or next((status for status in statuses if status != PASSED), PASSED)
        return word if STOPPED in word or STOPPED not in statuses else f"{word}, {STOPPED}"


def run(command: Command, seconds: float) -> str:
    """Runs a process for so many seconds at most and returns its status; nothing that it started is left running."""
    if seconds < FEWEST_SECONDS:
        return "late: no time was left for its last steps"
    mark = uuid4().hex
    with command.log.open("wb") if command.log else nullcontext() as log:
        process = subprocess.Popen(
            command.arguments,
            cwd=command.folder,
            env={**os.environ, "RCL_COMMAND": mark},
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )
        try:
            code = process.wait(max(0, seconds - command.grace))
            return PASSED if code == 0 else f"red: exit status {code}"
        except subprocess.TimeoutExpired:
            ask_to_end(process, command)
            return f"late: stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            ask_to_end(process, command)
            return STOPPED
        finally:
            process.kill()
            process.wait()
            kill_all(mark)


def ask_to_end(process: subprocess.Popen[bytes], command: Command) -> None:
    (os.kill if command.stop == signal.SIGINT else os.killpg)(process.pid, command.stop)
    with suppress(subprocess.TimeoutExpired):
        process.wait(command.grace)


def kill_all(mark: str) -> None:
    """Kills every process with `mark` in its environment: a table's runs are in sessions of their own."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def unpack_caches(call: Call) -> None:
    """Moves the compilers' caches to SCRATCH, and fills them with what an earlier call compiled."""
    caches = call.scratch / "caches"
    os.environ["TRITON_CACHE_DIR"], os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
        str(caches / name) for name in ("triton", "inductor")
    )
    if "CACHES" in call.inputs and not caches.exists():
        try:
            with tarfile.open(call.inputs["CACHES"]) as archive:
                archive.extractall(call.scratch, filter="data")
        except Exception as error:  # a damaged archive raises almost anything
            print(f"{call.inputs['CACHES']} is left out: {type(error).__name__}: {error}", flush=True)
    caches.mkdir(exist_ok=True)


def pack_caches(call: Call) -> None:
    """Packs what launches read of Triton's and Inductor's caches; Triton's alone where both are too large."""
    target = call.out / "caches.tar.xz"
    for names in (("triton", "inductor"), ("triton",)):
        with tarfile.open(target, "w:xz", preset=1) as archive:
            for name in names:
                if (call.scratch / "caches" / name).is_dir():
                    archive.add(call.scratch / "caches" / name, f"caches/{name}", filter=without_steps_of_compilation)
        if target.stat().st_size <= LARGEST_FILE:
            return
    keep_small(target)


def without_steps_of_compilation(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if member.name.endswith((".source", ".ttir", ".ttgir", ".llir", ".ptx")) else member


def keep_small(file: Path) -> None:
    """Deletes a file that is too large to go back, and prints that it is left out."""
    size = file.stat().st_size
    if size > LARGEST_FILE:
        print(
            f"{file.name} is left out: {size / MEGABYTE:.1f} MiB, and {LARGEST_FILE / MEGABYTE:.0f} go back", flush=True
        )
        file.unlink()


def record_verdicts(call: Call, test_verdicts: dict[str, str]) -> None:
    """Records the verdicts of the tests for every row from here on, and for the next call on this machine."""
    os.environ["RCL_GATE"] = "; ".join(f"{test} {test_verdicts[test]}" for test in TESTS if test in test_verdicts)
    if not call.dry_run:
        kept = {"commit": rows.describe()["commit"], **test_verdicts}
        (call.scratch / "verdicts.json").write_text(json.dumps(kept), encoding="utf-8")


def verdicts(call: Call) -> dict[str, str]:
    """Returns the verdict of each test on this commit, from an earlier call on this machine."""
    file = call.scratch / "verdicts.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if kept.pop("commit", None) != rows.describe()["commit"]:
        return {}
    return {test: f"{status.removesuffix(EARLIER)}{EARLIER}" for test, status in kept.items()}


def inputs() -> dict[str, Path]:
    """Returns the inputs that are there; raises SystemExit with each that is named and is not there."""
    travel = os.environ.get("TRAVEL")
    found, missing = {}, []
    if travel and not Path(travel).is_dir():
        missing.append(f"TRAVEL={travel}")
    for name, (file, _) in INPUTS.items():
        if name in os.environ:
            path = Path(os.environ[name]).resolve()
            found[name] = path
            missing += [] if path.exists() else [f"{name}={os.environ[name]}"]
        elif travel and (Path(travel) / file).exists():
            found[name] = (Path(travel) / file).resolve()
    if missing:
        raise SystemExit("gpu.sh: no such file or folder:\n  " + "\n  ".join(missing))
    commit = Path(travel) / "commit" if travel else None
    if commit is not None and commit.is_file():
        os.environ.setdefault("RCL_COMMIT", commit.read_text(encoding="utf-8").strip())
    return found


def parser() -> argparse.ArgumentParser:
    text = [f"    {name:12} {about} (TRAVEL/{file})" for name, (file, about) in INPUTS.items()]
    text += ["", "parts, and the seconds that each takes at most:"]
    text += [f"    {name:12} {part.seconds:4}  {part.about}" for name, part in PARTS.items()]
    found = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description=(__doc__ or "") + "\n".join(text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("out", type=Path, metavar="OUT", help="folder for rows and logs")
    found.add_argument("parts", metavar="PART[+PART...]", type=lambda text: text.split("+"), help="in this order")
    found.add_argument("--budget", type=float, default=540, help="seconds of all parts together (default: 540)")
    found.add_argument("--dry-run", action="store_true", help="no GPU is needed; the rows say so")
    return found


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        raise SystemExit(f"gpu.sh: no part is named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not options.dry_run:
        raise SystemExit(f"gpu.sh: PyTorch ({sys.executable}) sees no CUDA device; --dry-run needs none")
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(os.environ["SCRATCH"])
    call = Call(options.out.resolve(), scratch, inputs(), options.dry_run, time.monotonic() + options.budget)
    for number in (signal.SIGINT, signal.SIGTERM):  # what is under way ends, and what it gave goes back
        signal.signal(number, signal.default_int_handler)
    unpack_caches(call)
    test_verdicts = verdicts(call)
    if test_verdicts:
        record_verdicts(call, test_verdicts)
    print(f"{'+'.join(options.parts)} within {options.budget:.0f} s; rows and logs in {call.out}", flush=True)
    statuses: dict[str, str] = {}
    for name in options.parts:
        row = run_part(name, call)
        print(f"== {name}: {row['status']} ({row['seconds']} s)", flush=True)
        statuses[name] = row["status"]
        if name in TESTS:
            test_verdicts[name] = row["status"]
            record_verdicts(call, test_verdicts)
        rows.append(call.out / "parts.jsonl", [row], call.dry_run)
        if STOPPED in row["status"]:
            break
    pack_caches(call)
    print("\n" + "\n".join(f"{name:12} {status}" for name, status in statuses.items()), flush=True)
    return int(any(not status.startswith(PASSED) for status in statuses.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
