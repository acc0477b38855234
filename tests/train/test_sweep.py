"""Sweeps: of stubbed runs for who takes which trial, and of real ones on the digits for what a trial is."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from rcl_fast.train import sweep
from rcl_fast.train.loop.loss_readback import NonFiniteLoss
from rcl_fast.train.options import Config
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoints, status


def write_run(settings: Config) -> Path:
    """What a sweep reads of a finished run; its accuracy is tau / 10."""
    folder = settings.run.output
    assert folder is not None
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{folder.name} {settings.loss.tau} {settings.loss.compression_rest} {settings.run.resume}\n")
    rows = [{"epoch": epoch, "balanced_accuracy": value} for epoch, value in ((1, 0.05), (2, settings.loss.tau / 10))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"best_epoch": 2, "balanced_accuracy": 0.5, "selected_on": "validation"}
    (folder / results.METRICS).write_text(json.dumps(found))
    status.write(folder, "finished")
    return folder


def calls(study: Path) -> list[list[str]]:
    """Each run: trial, tau, compression_rest, what it resumed."""
    return [line.split() for line in (study.with_name(f"{study.stem}-trials") / "calls").read_text().splitlines()]


def start(study: Path, *more: str) -> None:
    sweep.main(["--dataset", "digits_lt", "--study", str(study), "--grid", *(more or ("tau=1.0,1.3",))])


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.train, "run", write_run)


@pytest.mark.usefixtures("stubbed")
def test_a_grid_is_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study.log"
    grid = ("tau=1.0,1.3,1.5", "compression-rest=0.005,0.05", "--", "--epochs", "2")
    start(study, *grid)
    combinations = {(tau, rest) for tau in ("1.0", "1.3", "1.5") for rest in ("0.005", "0.05")}
    assert Counter((tau, rest) for _, tau, rest, _ in calls(study)) == dict.fromkeys(combinations, 1)
    out = capsys.readouterr().out
    assert "best: tau 1.5" in " ".join(out.split())
    assert "15.0%" in out

    start(study, *grid)
    assert len(calls(study)) == 6  # nothing was repeated
    with pytest.raises(SystemExit, match=r"another sweep: space\.tau"):
        start(study, "tau=1.0,2.0", *grid[1:])
    with pytest.raises(SystemExit, match=r"run.optimization.epochs \(was 2, now 3\)"):
        start(study, *grid[:-1], "3")
    start(study, *grid, "--device", "cpu", "--workers", "0")  # workers may differ in these


def test_a_stopped_trial_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tmp_path / "study.log"

    def stopped(settings: Config) -> Path:
        write_run(settings)
        folder = settings.run.output
        assert folder is not None
        status.write(folder, "preempted")
        (folder / "config.json").write_text(json.dumps(settings.to_dict()))
        (folder / checkpoints.LAST).touch()
        raise SystemExit(os.EX_TEMPFAIL)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.train, "run", stopped)
        with pytest.raises(SystemExit) as stop:
            start(study)
        assert stop.value.code == os.EX_TEMPFAIL
    monkeypatch.setattr(sweep.train, "run", write_run)
    start(study, "tau=1.0,1.3", "--", "--workers", "7")
    first, again, other = calls(study)
    assert again[:3] == first[:3]
    assert again[3] == str(tmp_path / "study-trials" / first[0])  # resumed
    assert other[0] != first[0]


def test_a_trial_that_diverges_has_failed_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverging(settings: Config) -> Path:
        if settings.loss.tau == 1.0:
            raise SystemExit("the loss is not finite") from NonFiniteLoss()
        return write_run(settings)

    monkeypatch.setattr(sweep.train, "run", diverging)
    for _ in range(2):
        start(tmp_path / "study.log")
    assert [tau for _, tau, _, _ in calls(tmp_path / "study.log")] == ["1.3"]
    assert "diverged" in capsys.readouterr().out


def slow_run(settings: Config) -> Path:
    """The largest tau never ends in the process that is to be killed."""
    if settings.loss.tau == 1.5 and os.environ.get("HANGS"):
        assert settings.run.output is not None
        (settings.run.output / "hangs").touch()
        time.sleep(600)
    time.sleep(0.2)
    return write_run(settings)


def work(study: Path, hangs: bool) -> None:
    sweep.train.run = slow_run
    if hangs:
        os.environ["HANGS"] = "1"
    start(study, "tau=1.0,1.1,1.2,1.3,1.4,1.5")


def test_workers_share_a_study_and_a_killed_ones_trial_is_taken_up(tmp_path: Path) -> None:
    study = tmp_path / "study.log"
    clean = multiprocessing.get_context("forkserver")  # a fork of this process would inherit its threads' locks
    clean.set_forkserver_preload(["rcl_fast.train.sweep"])  # once for all: each would import it for seconds
    killed = clean.Process(target=work, args=(study, True))
    killed.start()
    hanging: list[Path] = []
    for _ in range(600):
        hanging = list(tmp_path.glob("study-trials/*/hangs"))
        if hanging:
            break
        time.sleep(0.2)
    (hung,) = hanging
    others = [clean.Process(target=work, args=(study, False)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(timeout=1200)
        assert other.exitcode == 0
    assert "1.5" not in [tau for _, tau, _, _ in calls(study)]  # it is taken
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(timeout=60)

    last = clean.Process(target=work, args=(study, False))
    last.start()
    last.join(timeout=1200)
    ran = calls(study)
    assert sorted(tau for _, tau, _, _ in ran) == ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5"]
    assert ran[-1][:2] == [hung.parent.name, "1.5"]


@pytest.mark.usefixtures("stubbed")
def test_tpe_draws_from_ranges(tmp_path: Path) -> None:
    study = tmp_path / "study.log"
    start(study, "tau=0.5..2", "loss=bcl_rcl,scl_rcl", "--sampler", "tpe", "--trials", "3")
    assert len({tau for _, tau, _, _ in calls(study)}) == 3
    assert all(0.5 <= float(tau) <= 2 for _, tau, _, _ in calls(study))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tau",), "expected an option of train/run.py and its values"),
        (("tau=1,,2",), "expected an option"),
        (("tau=1", "tau=2"), "tau is there twice"),
        (("lr=0",), "--lr must be above 0"),
        (("lr=0.1..0.2:ln", "--sampler", "tpe", "--trials", "2"), "'ln' is no scale"),
        (("lr=0.1..0.2", "--sampler", "tpe"), "say with --trials"),
        (("tau=1", "--", "--output", "elsewhere"), "each trial's own"),
    ],
)
@pytest.mark.usefixtures("stubbed")
def test_what_can_not_be_is_said_before_anything_runs(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        start(tmp_path / "study.log", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_reports")
def test_a_real_sweep_of_the_digits(tmp_path: Path) -> None:
    study = tmp_path / "study.log"
    start(study, "tau=0,1", "--", "--epochs", "1", "--workers", "0", "--loss", "logit_adjusted")
    taus = []
    for number in range(2):
        folder = tmp_path / "study-trials" / f"{number:04d}"
        assert status.read(folder) == "finished"
        assert 0 <= sweep.best_validation(folder)["balanced_accuracy"] <= 1
        taus.append(json.loads((folder / "config.json").read_text())["loss"]["tau"])
    assert sorted(taus) == [0, 1]
