"""Sweeps: of stubbed runs for which trials there are and who takes them, and of real ones for what a trial is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rcl_fast.train import sweep
from rcl_fast.train.errors import NotWritten, UserError
from rcl_fast.train.experiments import job_queue, study
from rcl_fast.train.experiments import sweep as searches
from rcl_fast.train.experiments.search_space import Range, Values, corners, grid, parse_space
from rcl_fast.train.experiments.study import Trial
from rcl_fast.train.options import SweepOptions
from rcl_fast.train.rundir import status

# What stands in for train/run.py: its accuracy is tau / 10, and it diverges, stops or waits where it is told to.
RUN = """
import json, os, sys, time
from pathlib import Path
given = sys.argv[1:]
value = lambda flag: given[given.index(flag) + 1] if flag in given else None
resumed, folder = value("--resume"), Path(value("--resume") or value("--output"))
tau = float(value("--tau") or json.loads((folder / "tau.json").read_text()))
(folder / "tau.json").write_text(json.dumps(tau))
with (folder.parent / "calls").open("a") as calls:
    calls.write(f"{folder.name} {tau} {resumed and 'resumed'}\\n")
def end(status, code=0):
    (folder / "status.json").write_text(json.dumps({"status": status}))
    sys.exit(code)
if tau == float(os.environ.get("DIVERGES", "nan")):
    end("diverged", "the loss is not finite")
if tau == float(os.environ.get("FAILS", "nan")):
    (folder / "config.json").write_text(os.environ["CONFIG"].replace('"TAU"', str(tau)))
    (folder / "last.pt").touch()
    end("failed", "the disk is full")
while tau == float(os.environ.get("HANGS", "nan")):
    (folder / "hangs").touch()
    time.sleep(0.05)
rows = [{"epoch": epoch, "balanced_accuracy": value} for epoch, value in ((1, 0.05), (2, tau / 10))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
metrics = {"best_epoch": 2, "balanced_accuracy": 0.5, "selected_on": "validation", "interrupted": False}
(folder / "metrics.json").write_text(json.dumps({**metrics, "last_epoch": 200}))
end("finished")
"""

# The command, with that in place of the trainer.
SWEEP = """
import sys
from pathlib import Path
from rcl_fast.train import sweep
from rcl_fast.train.experiments import runs
runs.TRAIN = Path(sys.argv[1])
sweep.main(sys.argv[2:])
"""


@pytest.fixture
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stands in for train/run.py."""
    file = tmp_path / "stub.py"
    file.write_text(RUN)
    monkeypatch.setattr("rcl_fast.train.experiments.runs.TRAIN", file)
    return file


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--dataset", "digits_lt", "--study", str(folder), "--grid", *(more or ("tau=1.0,1.3",))]


def start(folder: Path, *more: str) -> int:
    """Runs the sweep in this process; returns its exit status."""
    with pytest.raises(SystemExit) as end:
        sweep.main(arguments(folder, *more))
    return end.value.code  # type: ignore[return-value]  # a number, or the message of an error


def calls(folder: Path) -> list[list[str]]:
    """Each run: trial, tau, whether it was resumed."""
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def test_a_grid_is_run_once(stubbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    more = ("tau=1.0,1.5", "compression-rest=0.005,0.05", "--", "--loss", "bcl_rcl")
    assert start(folder, *more) == 0
    points = [(trial.parameters["tau"], trial.parameters["compression_rest"]) for trial in study.trials(folder)]
    assert points == [("1.0", "0.005"), ("1.0", "0.05"), ("1.5", "0.005"), ("1.5", "0.05")]
    said = " ".join(capsys.readouterr().out.split())
    assert "best: tau 1.5, compression_rest 0.005, in" in said
    assert "15.0%" in said

    assert start(folder, *more, "--device", "cpu", "--workers", "0") == 0  # callers may differ in these
    assert len(calls(folder)) == 4  # nothing was repeated
    assert "of another sweep: space.tau (was 1.0,1.5, now 1.0,2.0)" in str(start(folder, "tau=1.0,2.0", *more[1:]))
    assert "run.loss.loss (was bcl_rcl, now bcl)" in str(start(folder, *more[:-1], "bcl"))


def test_a_trial_that_diverges_is_done_and_one_that_fails_is_gone_on_with(
    stubbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    common = ("tau=1.0,1.2,1.3", "--", "--epochs", "200")
    config = json.dumps(sweep_config(*common[2:])).replace('"tau": 1.3', '"tau": "TAU"')
    monkeypatch.setenv("CONFIG", config)
    monkeypatch.setenv("DIVERGES", "1.0")
    monkeypatch.setenv("FAILS", "1.2")
    assert start(folder, *common) == 1
    said = capsys.readouterr().out
    assert "no result: trial 1, one of 3: tau 1.2: exit status 1: the disk is full" in said
    assert "no result: trial 0" not in said
    assert [trial.status for trial in study.trials(folder)] == ["diverged", "failed", "finished"]
    monkeypatch.delenv("FAILS")
    assert start(folder, *common) == 0
    assert calls(folder)[3:] == [["0001", "1.2", "resumed"]]


def sweep_config(*more: str) -> dict:
    from rcl_fast.train.config import parse

    return parse(["--dataset", "digits_lt", *more]).to_dict()


def test_callers_share_a_study_and_what_a_killed_one_left_is_taken_up(
    stubbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial of a caller that is killed goes on, as runs do: nobody takes it before it ends."""
    folder, taus = tmp_path / "study", "tau=1.0,1.1,1.2"
    command = [sys.executable, "-c", SWEEP, str(stubbed), *arguments(folder, taus)]
    first = subprocess.Popen(command, env={**os.environ, "HANGS": "1.0"})
    while not (hangs := list(folder.glob("*/hangs"))):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert start(folder, taus) == 1  # the others
    assert "no result: trial 0, one of 3: tau 1.0: another process is at it" in capsys.readouterr().out
    assert [trial.status for trial in study.trials(folder)] == [None, "finished", "finished"]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if str(hangs[0].parent).encode() in read(Path("/proc", pid, "cmdline")):
            os.kill(int(pid), signal.SIGKILL)
    assert start(folder, taus) == 0
    assert [tau for _, tau, _ in calls(folder)] == ["1.0", "1.1", "1.2", "1.0"]


def test_a_trial_that_another_caller_leaves_meanwhile_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 0 is another's, who leaves it while trial 1 runs; trial 2 stays another's to the end, and is tried last."""
    taken = {"0000", "0002"}
    monkeypatch.setattr(job_queue, "is_taken", lambda folder: folder.name in taken)
    folder = tmp_path / "study"
    search = searches._plan(SweepOptions("digits_lt", folder, ("tau=1,2,3,4",)), ())
    study.open_study(folder, search.content())
    for number, point in enumerate(({"tau": "1"}, {"tau": "2"}, {"tau": "3"})):
        assert study.make_trial(folder, number, point)
    jobs = searches._jobs(search)
    assert next(jobs).folder.name == "0001"
    taken.remove("0000")
    assert [job.folder.name for job in jobs] == ["0000", "0003", "0002"]


def test_of_several_that_make_a_study_one_wins_and_the_others_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, content = os.link, {"space": {"tau": "1,2"}}

    def after_another(unfinished: Path, file: Path) -> None:
        file.write_text(json.dumps({"space": {"tau": others}}))
        link(unfinished, file)

    monkeypatch.setattr(os, "link", after_another)
    others = "1,2"
    study.open_study(tmp_path / "one", content)
    others = "5"
    with pytest.raises(UserError, match=r"space\.tau \(was 5, now 1,2\)"):
        study.open_study(tmp_path / "other", content)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["study.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_study_is_named(tmp_path: Path, text: str) -> None:
    study.open_study(tmp_path, {"space": {}})
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(UserError, match=r"study\.json is damaged .* Name another folder"):
        study.open_study(tmp_path, {"space": {}})


def test_a_study_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match="the study can't be written there"):
        study.open_study(tmp_path / "file" / "study", {})


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_tpe_asks_for_each_trial_by_what_is_known_of_the_others(stubbed: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder, space = tmp_path / "study", ("tau=0.5..2", "loss=bcl_rcl,scl_rcl", "--sampler", "tpe")
    assert start(folder, *space, "--trials", "3", "--jobs-per-device", "2") == 0
    taus = [trial.parameters["tau"] for trial in study.trials(folder)]
    assert len(set(taus)) == 3
    assert all(0.5 <= tau <= 2 for tau in taus)
    assert start(folder, *space, "--trials", "4") == 0
    assert [trial.parameters["tau"] for trial in study.trials(folder)][:3] == taus
    assert len(calls(folder)) == 4


def test_tpe_learns(tmp_path: Path) -> None:
    """After 30 trials of a parabola the next ten are nearer to its top than ten random points would be.

    A random point is 2.9 away in the mean, with a deviation of 1.98; so ten are 29 ± 6.3 together.
    """
    tpe = pytest.importorskip("rcl_fast.train.experiments.tpe")
    space, tried = {"tau": Range(0.0, 10.0, log=False)}, list[Trial]()
    for number in range(40):
        parameters = tpe.ask(space, tried)
        trial = study.make_trial(tmp_path, number, parameters)
        assert trial is not None
        accuracy = 1 - (parameters["tau"] - 7) ** 2 / 100
        (trial.folder / "metrics.jsonl").write_text(json.dumps({"balanced_accuracy": accuracy}) + "\n")
        status.write(trial.folder, "finished")
        tried.append(trial)
    off = [abs(trial.parameters["tau"] - 7) for trial in tried]
    assert sum(off[30:]) < 29 - 2 * 6.3
    assert [trial.parameters for trial in study.trials(tmp_path)] == [trial.parameters for trial in tried]


def test_a_space_and_its_points() -> None:
    assert str(parse_space(["epochs=2..9"], ranges=True)["epochs"]) == "2..9"  # whole numbers
    space = parse_space(["--tau=1,2,1", "lr=0.01..1:log"], ranges=True)
    assert space == {"tau": Values(("1", "2")), "lr": Range(0.01, 1.0, log=True)}
    assert {name: str(of) for name, of in space.items()} == {"tau": "1,2", "lr": "0.01..1.0:log"}
    assert list(corners(space)) == [
        {"tau": "1", "lr": 0.01},
        {"tau": "2", "lr": 0.01},
        {"tau": "1", "lr": 0.01},
        {"tau": "1", "lr": 1.0},
    ]
    assert list(grid({"a": Values(("1", "2")), "b": Values(("x", "y"))})) == [
        {"a": "1", "b": "x"},
        {"a": "1", "b": "y"},
        {"a": "2", "b": "x"},
        {"a": "2", "b": "y"},
    ]


def test_a_data_set_that_is_nowhere_and_torchrun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="cifar10_lt is to be trained on: say where it is with --data DIR"):
        sweep.main(["--dataset", "cifar10_lt", "--study", str(tmp_path / "study"), "--grid", "tau=1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in str(start(tmp_path / "study"))
    assert not list(tmp_path.iterdir())


_SEVEN = ("seed", "epochs", "warmup_epochs", "lr", "tau", "alpha", "beta")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tau",), "expected an option of train/run.py and its values"),
        (("tau=1,,2",), "expected an option"),
        (("tau=1", "tau=2"), "tau is there twice"),
        (("lr=0",), "--lr must be at least 1e-09"),
        (("lr=0.1..0.2:ln", "--sampler", "tpe", "--trials", "2"), "'ln' is no scale"),
        (("lr=0.2..0.1", "--sampler", "tpe", "--trials", "2"), "LOW below HIGH"),
        (("lr=0..0.1:log", "--sampler", "tpe", "--trials", "2"), "above 0 where it is :log"),
        (("lr=0.1..0.2", "--sampler", "tpe"), "say with --trials"),
        (("lr=0.1..0.2",), "a range is for --sampler tpe"),
        (("tau=1..inf", "--sampler", "tpe", "--trials", "2"), "finite LOW below HIGH"),
        (("nonsense=1",), "--nonsense is no option of train/run.py; train/run.py --help has them all"),
        (("learning-rate=1",), "--learning-rate is no option of train/run.py; it is lr here"),
        (("output=x",), "--output is the same for all trials, or each trial's own"),
        (("mean=1,2",), "--mean has several values at once"),
        (("compile=yes",), "--compile is true or false"),
        (("tau=1,-1",), "--tau must be at least 0, got -1"),
        (("loss=rcl",), "did you mean scl_rcl?"),
        (("epochs=2.5..4", "--sampler", "tpe", "--trials", "2"), "both whole numbers"),
        (("loss=a..b", "--sampler", "tpe", "--trials", "2"), "--loss is no number and has no range"),
        (tuple(f"{name}={','.join('123456')}" for name in _SEVEN), "--grid has 279,936 combinations"),
        (("lr=0.1,0.2", "--", "--lr", "0.3"), "--lr: after -- for all trials, and in --grid, too"),
        (("tau=1", "--", "--dataset", "cifar10_lt"), "--dataset is of the whole search: give it before --"),
        (("tau=1", "--", "--data", "x"), "--data is of the whole search: give it before --"),
        (("tau=1", "--devices", "63"), "--devices 63: there are"),
        (("tau=1", "--trials", "0"), "--trials must be at least 1"),
        (("tau=1", "--jobs-per-device", "0"), "--jobs-per-device must be at least 1"),
        (("tau=1", "--", "--output", "elsewhere"), "each trial's own"),
    ],
)
def test_what_can_not_be_is_said_before_anything_runs(tmp_path: Path, given: tuple[str, ...], message: str) -> None:
    assert message in str(start(tmp_path / "study", *given))
    assert not list(tmp_path.iterdir())


def test_a_study_of_an_earlier_version_and_a_folder_of_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.log").write_text('{"op_code": 0}\n')
    said = str(start(tmp_path / "old.log"))
    assert f"Its trials are runs in {tmp_path / 'old-trials'}/" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert "holds no study but is not empty" in str(start(tmp_path / "other"))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_real_sweep_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    assert start(folder, "tau=1", "--", "--epochs", "1", "--workers", "0", "--loss", "logit_adjusted") == 0
    (trial,) = study.trials(folder)
    assert trial.status == "finished"
    assert 0 <= study.best_validation(trial.folder)["balanced_accuracy"] <= 1
    assert json.loads((trial.folder / "config.json").read_text())["loss"]["tau"] == 1
    assert "best: tau 1" in capsys.readouterr().out
