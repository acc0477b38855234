"""bench/gpu.py: parts share a budget, none stops another, and what comes back goes on next time."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, rows


@pytest.fixture
def call(tmp_path: Path) -> gpu.Call:
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    return gpu.Call(tmp_path / "out", tmp_path / "scratch", {}, dry_run=True, ends=time.monotonic() + 500)


def python(code: str) -> gpu.Command:
    return gpu.Command([sys.executable, "-c", code])


def wait_for(condition: Callable[[], bool]) -> None:
    """Raises AssertionError after five minutes."""
    ends = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < ends, "it did not come in five minutes"
        time.sleep(0.05)


def part(*codes: str, seconds: int = 60, **more: Any) -> gpu.Part:
    def commands(call: gpu.Call) -> gpu.Commands:
        for code in codes:
            yield python(code)
        return None

    return gpu.Part(seconds, "of a test", commands, **more)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of a call; what it returns is its OUT."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("RCL_COMMIT", "abc1234")
    for name in ("TRAVEL", "RCL_GATE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", *gpu.INPUTS):
        monkeypatch.setenv(name, "")  # so that what the call sets is taken back
        monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda *_: before)
    return tmp_path / "out"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_red_part_stops_no_other_and_shows_in_rows_and_exit_status(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gate(call: gpu.Call) -> gpu.Commands:
        yield python("raise SystemExit(1)")
        return "red: 3 of 412"

    told = machine.parent / "told"
    speed = part(f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(os.environ['RCL_GATE'])")
    monkeypatch.setattr(gpu, "PARTS", {"gate": gpu.Part(60, "", gate), "speed": speed})
    assert gpu.main([str(machine), "gate+speed", "--dry-run"]) == 1
    found = rows_of(machine / "parts.jsonl")
    assert [row["status"] for row in found] == ["red: 3 of 412", "passed"]
    assert told.read_text() == found[1]["gate"] == "gate red: 3 of 412"
    assert found[0]["commit"] == "abc1234"
    assert rows.main([str(machine / "parts.jsonl")]) == 0


def test_the_next_call_on_a_machine_knows_what_the_tests_said(call: gpu.Call, machine: Path) -> None:
    real = call._replace(dry_run=False)
    gpu.record_verdicts(real, {"gate": "passed: 900 tests"})
    assert rows.describe()["gate"] == "gate passed: 900 tests"
    gpu.record_verdicts(call, {"gate": "passed"})  # a dry run collects tests and proves nothing
    assert gpu.verdicts(real) == {"gate": "passed: 900 tests, in an earlier call"}
    gpu.record_verdicts(real, {**gpu.verdicts(real), "captured": "red: 1 of 8"})
    assert rows.describe()["gate"] == "gate passed: 900 tests, in an earlier call; captured red: 1 of 8"
    assert gpu.verdicts(real)["gate"] == "passed: 900 tests, in an earlier call"
    os.environ["RCL_COMMIT"] = "another"
    assert gpu.verdicts(real) == {}


def test_parts_that_passed_exit_with_0(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"a": part("pass"), "b": part("pass")})
    assert gpu.main([str(machine), "a+b", "--dry-run"]) == 0


def test_a_part_that_runs_out_of_time_is_late_and_what_it_started_is_gone(
    call: gpu.Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    sleeping = "subprocess.Popen(['sleep', '600']).pid"
    code = (
        f"import pathlib, subprocess, time; child = pathlib.Path({str(child)!r}); new = child.with_suffix('.new'); "
        f"new.write_text(str({sleeping})); new.rename(child); time.sleep(600)"
    )
    wait = gpu.subprocess.Popen.wait

    def wait_from_its_start(self: gpu.subprocess.Popen, timeout: float | None = None) -> int:
        wait_for(child.exists)  # a busy machine may take longer to start it than it is given
        return wait(self, timeout)

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", wait_from_its_start)
    status = gpu.follow(part(code, "pass").commands(call), time.monotonic() + 12)
    assert status in ("late: stopped after 12 s", "late: stopped after 11 s")
    process = Path("/proc") / child.read_text() / "status"

    def has_ended() -> bool:
        try:
            return "State:\tZ" in process.read_text()  # ended, and nobody has asked for its status
        except OSError:
            return True

    wait_for(has_ended)  # it was killed, which takes until it has its turn


def test_a_part_without_time_or_packages_is_not_started(
    call: gpu.Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    code = f"open({str(started)!r}, 'w')"
    parts = {"late": part(code), "lacking": part(code, needs=("no_such_package",)), "empty": part(code, data="CIFAR10")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    spent = call._replace(ends=time.monotonic() + gpu.CLOSING_SECONDS)
    assert gpu.run_part("late", spent)["status"] == "late: no time was left to start it"
    assert gpu.run_part("lacking", call)["status"] == "left out: no no_such_package here (WHEELS=folder brings them)"
    assert gpu.run_part("empty", call._replace(dry_run=False))["status"].startswith("left out: no CIFAR10 here")
    assert not started.exists()


def test_a_part_takes_no_more_than_is_left_of_the_budget(call: gpu.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"long": part("pass", seconds=300)})
    assert gpu.run_part("long", call)["limit_seconds"] == 300
    short = call._replace(ends=time.monotonic() + 100)
    assert gpu.run_part("long", short)["limit_seconds"] <= 100 - gpu.CLOSING_SECONDS


def test_later_commands_of_a_part_run_after_one_that_failed(call: gpu.Call, tmp_path: Path) -> None:
    second = tmp_path / "second"
    commands = part("raise SystemExit(3)", f"open({str(second)!r}, 'w')").commands(call)
    assert gpu.follow(commands, time.monotonic() + 600) == "red: exit status 3"
    assert second.exists()


@pytest.mark.parametrize(
    ("status", "failures", "expected"),
    [
        ("passed", 0, "passed: 10 tests"),
        ("red: exit status 1", 2, "red: 2 of 10"),
        ("late: stopped after 220 s", 2, "red: 2 of 10, late: stopped after 220 s"),
        ("late: stopped after 220 s", 0, "late: stopped after 220 s, 10 tests passed before"),
        ("red: exit status 3", 0, "red: exit status 3, 10 tests passed before"),
    ],
)
def test_what_a_report_of_tests_says(status: str, failures: int, expected: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    suite = f'<testsuite tests="12" failures="{failures}" errors="0" skipped="2"/>'
    report.write_text(f"<testsuites>{suite}</testsuites>", encoding="utf-8")
    assert gpu.verdict(status, report) == expected


def test_a_gate_without_a_report_did_not_pass(tmp_path: Path) -> None:
    assert not gpu.verdict("passed", tmp_path / "none.xml").startswith("passed:")
    (tmp_path / "cut.xml").write_text("<testsuites><testsuite", encoding="utf-8")
    assert gpu.verdict("late: stopped after 9 s", tmp_path / "cut.xml") == "late: stopped after 9 s"


def made_up_run(folder: Path, name: str, status: str, epochs: int) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "status.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    (folder / name / "metrics.jsonl").write_text("{}\n" * epochs, encoding="utf-8")
    for file in ("last.pt", "best.pt", "previous.pt", "mid_epoch.pt"):
        (folder / name / file).write_bytes(name.encode() * 10_000)


def test_runs_come_back_and_go_on(
    call: gpu.Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "runs"
    for name, status, epochs in (("far", "preempted", 9), ("near", "running", 2), ("mid", "preempted", 5)):
        made_up_run(folder, name, status, epochs)
    made_up_run(folder, "done", "finished", 1)
    monkeypatch.setattr(gpu, "LARGEST_FILE", 130_000)  # two of the three
    gpu.pack_runs(folder, call.out)
    assert "runs that do not go back, as 0 MiB do: near" in capsys.readouterr().out
    (call.out / "table1.jsonl").write_text('{"key": "done"}\n', encoding="utf-8")
    (call.out / "parts.jsonl").write_text('{"part": "table1"}\n', encoding="utf-8")

    target = tmp_path / "next"
    (target / "mid").mkdir(parents=True)  # this machine has gone on with it
    gpu.bring_runs(call._replace(inputs={"RUNS": call.out}), target)
    found = {str(file.relative_to(target)) for file in target.glob("*/*")}
    whole = {"status.json", "metrics.jsonl"}
    assert found == {*(f"far/{name}" for name in {*whole, "last.pt", "best.pt"}), *(f"done/{name}" for name in whole)}
    assert (target / "far" / "last.pt").read_bytes() == b"far" * 10_000
    assert [file.name for file in sorted(target.glob("*.jsonl")) if gpu.has_keys(file)] == ["table1.jsonl"]


def test_a_call_that_is_stopped_ends_what_runs_and_keeps_its_row(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started, saved = tmp_path / "started", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time; "
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(0))); "
        f"pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    )
    monkeypatch.setattr(gpu, "PARTS", {"long": part(code, seconds=300), "next": part("pass")})
    wait = gpu.subprocess.Popen.wait

    def interrupted(self: gpu.subprocess.Popen, timeout: float | None = None) -> int:
        if timeout is not None and timeout > 100:
            wait_for(started.exists)
            raise KeyboardInterrupt  # as SIGTERM raises it in main
        return wait(self, None if timeout is None else 300)  # the seconds of grace are few on a busy machine

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", interrupted)
    assert gpu.main([str(machine), "long+next", "--dry-run"]) == 1
    assert [(row["part"], row["status"]) for row in rows_of(machine / "parts.jsonl")] == [("long", gpu.STOPPED)]
    assert saved.exists()


def test_what_a_part_did_not_foresee_stops_no_other(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: gpu.Call) -> gpu.Commands:
        yield python("pass")
        raise EOFError("a damaged archive")

    monkeypatch.setattr(gpu, "PARTS", {"broken": gpu.Part(60, "", broken), "next": part("pass")})
    assert gpu.main([str(machine), "broken+next", "--dry-run"]) == 1
    found = [row["status"] for row in rows_of(machine / "parts.jsonl")]
    assert found == ["red: EOFError: a damaged archive", "passed"]


def test_a_damaged_cache_is_left_out(call: gpu.Call, machine: Path, tmp_path: Path) -> None:
    (tmp_path / "caches.tar.xz").write_bytes(b"\xfd7zXZ damaged")
    gpu.unpack_caches(call._replace(inputs={"CACHES": tmp_path / "caches.tar.xz"}))
    assert (call.scratch / "caches").is_dir()


def test_what_is_too_large_to_go_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "LARGEST_FILE", 10)
    large = tmp_path / "large"
    large.write_bytes(b"0" * 11)
    gpu.keep_small(large)
    assert not large.exists()
    assert "large is left out" in capsys.readouterr().out


def test_inputs_that_are_not_there_are_named_at_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCL", "no/contrastive.py")
    monkeypatch.setenv("TRAVEL", "no/folder")
    with pytest.raises(SystemExit, match=r"(?s)TRAVEL=no/folder.*BCL=no/contrastive.py"):
        gpu.main([str(machine), "gate", "--dry-run"])


def test_the_folder_that_travels_is_found_by_its_files(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRAVEL", str(tmp_path))
    monkeypatch.delenv("RCL_COMMIT")
    (tmp_path / "commit").write_text("def5678\n", encoding="utf-8")
    (tmp_path / "bcl.py").write_text("", encoding="utf-8")
    assert gpu.inputs() == {"BCL": tmp_path / "bcl.py"}
    assert rows.describe()["commit"] == "def5678"


def test_an_unknown_part_is_refused_with_those_there_are(machine: Path) -> None:
    with pytest.raises(SystemExit, match=r"no part is named gates; there are gate, "):
        gpu.main([str(machine), "gates", "--dry-run"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "no rows"),
        ("{", "no JSON"),
        ("[]", "no row"),
        ('{"part": "speed"}', "it lacks date, commit"),
        (json.dumps(dict.fromkeys(rows.REQUIRED, "unknown")), "of which commit"),
    ],
)
def test_rows_that_are_not_well_formed_are_refused(
    line: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{line}\n" if line else "", encoding="utf-8")
    assert rows.main([str(file)]) == 1
    assert problem in capsys.readouterr().out


def test_what_was_compiled_goes_on_another_machine(call: gpu.Call, machine: Path, tmp_path: Path) -> None:
    kernel = call.scratch / "caches" / "triton" / "ABC"
    kernel.mkdir(parents=True)
    for suffix in ("cubin", "json", "ttir", "ptx"):
        (kernel / f"kernel.{suffix}").write_text(suffix, encoding="utf-8")
    gpu.pack_caches(call)
    (tmp_path / "other").mkdir()
    other = call._replace(scratch=tmp_path / "other", inputs={"CACHES": call.out / "caches.tar.xz"})
    gpu.unpack_caches(other)
    found = sorted(file.name for file in Path(os.environ["TRITON_CACHE_DIR"]).rglob("kernel.*"))
    assert found == ["kernel.cubin", "kernel.json"]  # all that a launch reads
