"""Whole runs on few small images: what is trained, written, resumed, and said when something is wrong."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcl_fast.train import verify
from rcl_fast.train.config import parse
from rcl_fast.train.data.datasets import Splits
from rcl_fast.train.errors import NonFiniteLoss, NotWritten, Preempted, UserError
from rcl_fast.train.jobs import run_folder, second_stage, train
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch, fingerprint
from rcl_fast.train.loop import engine
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.network.optimization import build_optimizer
from rcl_fast.train.options import Config
from rcl_fast.train.rundir import checkpoints, writer
from rcl_fast.train.rundir.status import write as write_status

METRICS = {
    "balanced_accuracy",
    "harmonic_mean",
    "geometric_mean",
    "expected_calibration_error",
    "reliability",
    "per_class_accuracy",
    "many",
    "medium",
    "few",
    "worst_class",
    "best_epoch",
    "last_epoch_balanced_accuracy",
    "last_epoch_harmonic_mean",
    "parameters",
    "images_per_second",
    "waiting_for_data",
    "loader",
    "selected_on",
}


def configure(output: Path, *arguments: str) -> Config:
    defaults = {"--workers": "0", "--batch-size": "100", "--epochs": "1", "--output": str(output)}
    others = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    return parse([*others, *arguments])


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / checkpoints.LAST)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs on the digits, compression from the third."""
    return train.run(configure(tmp_path_factory.mktemp("finished") / "run", "--epochs", "4"))


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    found = {path.name.split(".tfevents")[0] for path in finished.iterdir()}
    promised = {"config.json", "metrics.json", "metrics.jsonl", "report.html", "last.pt", "best.pt", "events.out"}
    promised.add("per_class.csv")
    assert promised <= found
    assert not list(finished.glob("*.unfinished"))
    results = metrics(finished)
    assert results.keys() >= METRICS
    assert results["parameters"] == 464_154
    assert len(results["per_class_accuracy"]) == 10
    assert results["last_epoch"] == 4
    assert not results["interrupted"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] == pytest.approx(2 * row["cross_entropy"] + row["contrastive"], rel=1e-5) for row in rows)
    assert "Compression from epoch 3" in (finished / "report.html").read_text()


def test_the_configuration_written_is_the_one_that_ran(finished: Path) -> None:
    saved = json.loads((finished / "config.json").read_text())
    assert saved["optimization"]["epochs"] == 4
    assert saved["optimization"]["batch_size"] == 100
    assert saved["loss"]["tau"] == 1.3  # the recipe's
    assert saved["data"]["loader"] == "device"  # what "auto" was


@pytest.mark.usefixtures("without_reports")
def test_the_same_seed_gives_the_same_weights_and_another_does_not(finished: Path, tmp_path: Path) -> None:
    again = train.run(configure(tmp_path / "again", "--epochs", "4"))
    assert_same_weights(finished, again)
    other = train.run(configure(tmp_path / "other", "--epochs", "1", "--seed", "1"))
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert json.loads((other / "metrics.jsonl").read_text())["loss"] != first["loss"]


def interrupt_in_epoch(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the second step of an epoch (from 0)."""
    step, steps = train_step, []

    def interrupted(training: Training, batch: dict) -> dict:
        steps.append(training.epoch)
        if steps.count(epoch) == 2:
            raise KeyboardInterrupt
        return step(training, batch)

    monkeypatch.setattr(engine, "train_step", interrupted)


@pytest.mark.slow
def test_ctrl_c_leaves_a_report_and_a_checkpoint_that_goes_on_as_if_nothing_happened(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_in_epoch(3, patch)  # after compression has begun
        train.run(configure(folder, "--epochs", "4"))
    assert metrics(folder)["interrupted"]
    assert metrics(folder)["last_epoch"] == 3
    assert (folder / "report.html").exists()

    train.run(parse(["--resume", str(folder)]))
    assert metrics(folder)["last_epoch"] == 4
    assert_same_weights(finished, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.usefixtures("without_reports")
def test_ctrl_c_in_the_first_epoch_reports_nothing_and_the_epoch_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_in_epoch(0, patch)
        with pytest.raises(UserError, match=r"in the first epoch, .*nothing to report yet: --resume .*/run goes on"):
            train.run(configure(folder))
    assert status(folder) == "interrupted"
    assert {path.name for path in folder.glob("*.pt")} == {checkpoints.LAST}
    assert not (folder / "metrics.json").exists()
    train.run(parse(["--resume", str(folder)]))
    assert metrics(folder)["last_epoch"] == 1


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


def signal_before(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM before the engine calls that function of its own for the `call`-th time, from 0."""
    original, calls = getattr(engine, name), itertools.count()

    def signalled(*arguments: object, **options: object) -> object:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)  # in this thread, so that it has come when this returns
        return original(*arguments, **options)

    monkeypatch.setattr(engine, name, signalled)


@pytest.mark.slow
@pytest.mark.usefixtures("without_reports")
@pytest.mark.parametrize(
    ("place", "call", "position"),
    [("train_step", 4, (1, 2)), ("train_step", 0, (0, 1)), ("evaluate", 2, (2, 3))],  # compression is from epoch 2 on
)
def test_a_signal_saves_within_an_epoch_and_the_run_goes_on_as_if_nothing_happened(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int, position: tuple[int, int]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_before(place, call, patch)
        with pytest.raises(Preempted) as stopped:
            train.run(configure(folder, "--epochs", "4"))
    assert stopped.value.exit_status == os.EX_TEMPFAIL
    assert status(folder) == "preempted"
    saved = checkpoints.load(folder / checkpoints.MID_EPOCH)["loader"]
    assert (saved["epoch"], saved["step"]) == position

    train.run(parse(["--resume", str(folder)]))
    assert_same_weights(finished, folder)
    assert status(folder) == "finished"
    assert [row["loss"] for row in history(folder)] == [row["loss"] for row in history(finished)]
    assert len(checkpoints.load(folder / checkpoints.LAST)["notes"]) == 1  # compression began once


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def reshape(path: Path) -> None:
    state = checkpoints.load(path)
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.ones(1)  # which a copy would broadcast
    checkpoints.save(path, state)


@pytest.mark.usefixtures("without_reports")
@pytest.mark.parametrize(("harm", "said"), [(cut_short, "not a zip file"), (reshape, "momentum [1] for parameter 0")])
def test_a_damaged_checkpoint_is_named_and_the_run_ends_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    harm(folder / checkpoints.LAST)
    train.run(parse(["--resume", str(folder)]))
    printed = capsys.readouterr().out
    assert "last.pt is damaged" in printed
    assert said in printed
    assert "going on from the one before, previous.pt" in printed
    assert (folder / "last.pt.damaged").is_file()
    assert_same_weights(finished, folder)


@pytest.mark.usefixtures("without_reports")
def test_a_best_epoch_that_is_lost_is_said_before_training_and_at_the_end(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    state = checkpoints.load(folder / checkpoints.LAST)
    checkpoints.save(folder / checkpoints.LAST, {**state, "best_epoch": 1})
    other = {**checkpoints.load(folder / checkpoints.BEST), "epoch": 3}
    checkpoints.save(folder / checkpoints.BEST, other)
    with pytest.raises(
        UserError, match=r"(?s)best epoch, 1, are lost: .*best\.pt has the weights of epoch 3.*--resume"
    ):
        train.run(parse(["--resume", str(folder)]))
    assert "the weights of the best epoch so far, 1, are lost" in capsys.readouterr().out
    checkpoints.save(folder / checkpoints.BEST, {**other, "epoch": 1})
    (folder / "metrics.jsonl").unlink()
    train.run(parse(["--resume", str(folder)]))
    assert [row["epoch"] for row in history(folder)] == [1, 2, 3, 4]  # what a stop kept from being written


@pytest.mark.usefixtures("without_reports")
def test_a_run_that_diverged_is_warned_of(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    write_status(folder, "diverged")
    train.run(parse(["--resume", str(folder)]))
    assert "likely to do so again. Only --precision may change" in capsys.readouterr().out


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.mark.parametrize("option", ["--resume", "--output"])
def test_a_folder_that_another_process_writes_to_is_left_as_it_is(finished: Path, tmp_path: Path, option: str) -> None:
    folder = tmp_path / "run"
    if option == "--resume":
        shutil.copytree(finished, folder)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / writer.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        with pytest.raises(UserError, match=r"another process is writing to .*nothing was written"):
            train.run(parse(["--resume", str(folder)]) if option == "--resume" else configure(folder))
        with pytest.raises(UserError, match="another process is writing to"), second_stage._claimed(folder):
            pass
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        other.communicate()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        (("model", "arch"), "resnet50", "arch 'resnet32', not 'resnet50'"),
        (("data", "imbalance"), 10.0, r"training set \(383 images of 10 classes\) is not this run's"),
        (("loss", "loss"), "ce", "loss 'bcl_rcl', not 'ce'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_written(
    finished: Path, tmp_path: Path, option: tuple[str, str], value: object, said: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    saved = json.loads((folder / "config.json").read_text())
    saved[option[0]][option[1]] = value
    (folder / "config.json").write_text(json.dumps(saved))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match=said):
        train.run(parse(["--resume", str(folder)]))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.usefixtures("without_reports")
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoints._write

    def full(state: dict, file: object) -> None:
        if state["epoch"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(state, file)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_write", full)
        with pytest.raises(NotWritten, match=r"No space left on device.*as it was: last\.pt, previous\.pt, best\.pt"):
            train.run(configure(folder, "--epochs", "3"))
    assert status(folder) == "failed"
    assert not list(folder.glob("*.unfinished"))
    train.run(parse(["--resume", str(folder)]))
    assert metrics(folder)["last_epoch"] == 3


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    config = configure(tmp_path / "file" / "run")
    (tmp_path / "file").touch()  # after the options were checked
    with pytest.raises(UserError, match=r"can't be written .*choose another folder with --output"):
        train.run(config)


def test_another_run_is_never_written_over(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a run: go on with --resume"):
        train.run(configure(finished))
    shutil.copy(finished / checkpoints.BEST, tmp_path)  # as a second stage leaves it
    with pytest.raises(UserError, match=r"already holds a network, best\.pt: name another folder"):
        train.run(configure(tmp_path))


def test_resuming_after_the_data_changed_on_disk_is_refused(tmp_path: Path) -> None:
    write_image_lists(tmp_path / "data")
    folder = train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path / "data")))
    before = (folder / checkpoints.LAST).read_bytes()
    train_list = tmp_path / "data" / "ImageNet_LT_train.txt"
    train_list.write_text("".join(train_list.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"12 images of 3 classes\) is not this run's \(11 images"):
        train.run(parse(["--resume", str(folder)]))
    assert (folder / checkpoints.LAST).read_bytes() == before


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step's loss is finite and its update is not."""
    epoch = engine.train_epoch

    def diverging(training: Training, *arguments: object) -> dict:
        row = epoch(training, *arguments)
        if training.epoch == 1:
            with torch.no_grad():
                training.model.classifier.weight[0, 0] = float("inf")
        return row

    monkeypatch.setattr(engine, "train_epoch", diverging)
    with pytest.raises(NonFiniteLoss, match=r"weights are not finite after epoch 2.*\n.*last\.pt"):
        train.run(configure(tmp_path / "run", "--epochs", "3"))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.usefixtures("without_tsne")
@pytest.mark.parametrize(
    ("interrupted", "done"),
    [
        (checkpoints.LAST, 1),
        pytest.param(checkpoints.BEST, 2, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_while_a_checkpoint_is_written_reports_what_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str, done: int
) -> None:
    """Of the second epoch, which is the best one here."""
    save, end_epoch = checkpoints.save, Training.end_epoch

    def interrupting(path: Path, state: dict, *previous: Path | None) -> None:
        if path.name == interrupted and state["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, state, *previous)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", interrupting)
        patch.setattr(
            Training, "end_epoch", lambda self, row: end_epoch(self, {**row, "balanced_accuracy": self.epoch})
        )
        train.run(configure(folder, "--epochs", "3"))
    assert metrics(folder)["last_epoch"] == checkpoints.load(folder / checkpoints.LAST)["epoch"] == done
    train.run(parse(["--resume", str(folder)]))
    assert checkpoints.load(folder / checkpoints.BEST)["epoch"] == metrics(folder)["best_epoch"]


def test_a_bad_test_image_loses_no_training(tmp_path: Path) -> None:
    write_image_lists(tmp_path / "data")
    (tmp_path / "data" / "ImageNet_LT_test.txt").write_text("missing.png 0\n")
    with pytest.raises(UserError, match=r"(?s)missing\.png .*Training is done: mend this, then --resume"):
        train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path / "data")))
    (tmp_path / "data" / "ImageNet_LT_test.txt").write_text("images/n000 é/0.png 0\n")
    train.run(parse(["--resume", str(tmp_path / "run")]))
    assert (tmp_path / "run" / "report.html").exists()


def test_images_of_another_size_are_named(tmp_path: Path) -> None:
    write_image_lists(tmp_path / "data")
    with pytest.raises(UserError, match=r"line 1\): it has 50x40 pixels, and --evaluation as_is expects 32x32"):
        train.run(
            configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path / "data"), "--evaluation", "as_is")
        )


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260101-000000")
    config = parse([])
    assert [run_folder.make(config, ExitStack()).name for _ in range(2)] == [
        "digits_lt-bcl_rcl-resnet32-20260101-000000",
        "digits_lt-bcl_rcl-resnet32-20260101-000000-2",
    ]


@pytest.mark.usefixtures("without_tsne")
def test_a_run_started_in_fp32_goes_on_in_fp16(tmp_path: Path) -> None:
    folder = train.run(configure(tmp_path / "run", "--epochs", "1"))
    train.run(parse(["--resume", str(folder), "--precision", "fp16"]))
    assert metrics(folder)["precision"] == "fp16"


def test_a_loss_that_is_not_finite_stops_the_run_and_describes_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train_step

    def poisoned(training: Training, batch: Batch) -> dict:
        if training.epoch == 1:
            batch.views[0][0] = float("nan")
        return step(training, batch)

    monkeypatch.setattr(engine, "train_step", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteLoss) as raised:
        train.run(configure(folder, "--epochs", "3"))
    assert status(folder) == "diverged"
    for part in (
        "not finite in epoch 2",
        "100 images of",
        "'x1': 'nan to nan'",
        "positions in the training set",
        "last.pt",
    ):
        assert part in str(raised.value)
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())
    assert checkpoints.load(folder / checkpoints.LAST)["epoch"] == 1


@pytest.mark.usefixtures("without_tsne")
@pytest.mark.parametrize("loss", ["ce", "balanced_softmax", "logit_adjusted", "cb_focal", "ldam_drw", "scl", "scl_rcl"])
def test_every_loss_trains(tmp_path: Path, loss: str) -> None:
    folder = train.run(configure(tmp_path / "run", "--epochs", "3", "--lr", "0.02", "--loss", loss))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ("contrastive" in rows[0]) == (loss in ("scl", "scl_rcl"))
    assert rows[1]["loss"] < rows[0]["loss"]  # the third epoch of ldam_drw weighs the classes anew


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path: Path, precision: str) -> None:
    folder = train.run(configure(tmp_path / "run", "--epochs", "3", "--lr", "0.02", "--precision", precision))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["loss"] < rows[0]["loss"]
    assert weights(folder)["classifier.weight"].dtype == torch.float32


def write_image_lists(data: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for label, count in enumerate([6, 4, 2]):
        for number in range(count):
            path = Path(f"images/n{label:03} é/{number}.png")
            (data / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(data / path)
            lines.append(f"{path} {label}")
    for part in ("train", "val", "test"):
        (data / f"ImageNet_LT_{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


IMAGENET = ("--dataset", "imagenet_lt", "--arch", "timm/resnet10t", "--batch-size", "4")
SMALL = ("--image-size", "32", "--resize", "36", "--head-hidden", "32", "--head-out", "16")


def test_imagenet_lists_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_lists(tmp_path / "data")
    folder = train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path / "data")))
    assert metrics(folder)["selected_on"] == "validation (the data set's own)"
    said = capsys.readouterr().out
    assert "115,846" in said  # the published size, which these lists do not have
    assert "report.html" in said


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_missing_image_is_named_with_its_line(tmp_path: Path, loader: str) -> None:
    write_image_lists(tmp_path / "data")
    (tmp_path / "data" / "images/n001 é/2.png").unlink()
    with pytest.raises(
        UserError, match=r"n001 é/2\.png \(ImageNet_LT_train\.txt, line 9\): there is no such file"
    ) as error:
        train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path / "data"), "--loader", loader))
    _, names_all, mend, saved = str(error.value).splitlines()
    assert (
        names_all == f"All bad ones are named by: python train/verify.py --dataset imagenet_lt --data {tmp_path}/data"
    )
    assert mend == (
        f"Mend them, then go on with --resume {tmp_path}/run; or start anew with --on-bad-image skip, which leaves "
        "them out"
    )
    assert saved.startswith("No epoch is done, so nothing trained is saved yet: ")


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_bad_images_are_left_out_when_asked(tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the manifest knows before the run, and one that went bad after it was written."""
    write_image_lists(tmp_path / "data")
    (tmp_path / "data" / "images/n000 é/3.png").write_bytes(b"")
    arguments = (*IMAGENET, *SMALL, "--data", str(tmp_path / "data"), "--loader", loader)
    with pytest.raises(UserError, match=r"(?s)no manifest .*python train/verify\.py --dataset imagenet_lt"):
        train.run(configure(tmp_path / "run", *arguments, "--on-bad-image", "skip"))
    assert verify.main(["--dataset", "imagenet_lt", "--data", str(tmp_path / "data"), "--workers", "1"]) == 1
    with pytest.raises(UserError, match=r"(?s)3 of 36 images are bad.*--on-bad-image skip"):
        train.run(configure(tmp_path / "run", *arguments))
    (tmp_path / "data" / "images/n001 é/2.png").write_bytes(b"damaged since")
    capsys.readouterr()
    folder = train.run(configure(tmp_path / "run", *arguments, "--on-bad-image", "skip", "--epochs", "2"))
    said = capsys.readouterr().out
    assert said.count("1 bad image left out") == 3  # train, validation, test
    assert said.count("left out: cannot read the image") == 3
    assert "n001 é/2.png (ImageNet_LT_train.txt, line 9)" in said
    assert metrics(folder)["last_epoch"] == 2


@pytest.mark.usefixtures("without_reports")
def test_another_loader_does_not_go_on_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train.run(configure(tmp_path / "run", "--epochs", "1"))
    with pytest.raises(UserError, match=r"--loader \(was device, now torchvision\)"):
        train.run(parse(["--resume", str(folder), "--loader", "torchvision"]))
    monkeypatch.setattr("rcl_fast.train.loaders.device.fingerprint", lambda spec, pipeline: fingerprint(spec, "new"))
    with pytest.raises(UserError, match=r"--resume .*the saved position .*loader \(was device 1, now new\)"):
        train.run(parse(["--resume", str(folder)]))


@pytest.mark.usefixtures("without_tsne")
def test_noise_instead_of_images(tmp_path: Path) -> None:
    folder = train.run(configure(tmp_path / "run", "--epochs", "1", "--synthetic-data"))
    assert metrics(folder)["waiting_for_data"] < 0.5


@pytest.mark.usefixtures("without_reports")
@pytest.mark.parametrize("loader", ["torchvision", "device", "dali"])
def test_every_loader_trains_the_digits(tmp_path: Path, loader: str) -> None:
    """Well above chance (10 %) after twelve epochs, whoever makes the views."""
    folder = train.run(configure(tmp_path / "run", "--epochs", "12", "--loss", "ce", "--loader", loader))
    assert metrics(folder)["balanced_accuracy"] > 0.4


def test_missing_data_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)imagenet_lt: .*--data DIR should hold.*ImageNet_LT_train\.txt"):
        train.run(configure(tmp_path / "run", *IMAGENET))
    assert not (tmp_path / "run").exists()


def test_several_processes_without_torchrun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RANK, LOCAL_RANK, .* torchrun --nproc-per-node 2"):
        train.run(configure(tmp_path / "run"))


def loaded(config: Config) -> tuple[Config, Splits]:
    splits = build.load(config)
    return build.with_loader(config, splits, train.choose_runtime(config.run)), splits


def test_accumulated_parts_give_the_whole_batch_gradient_of_a_mean(tmp_path: Path) -> None:
    """Cross-entropy and a network without BatchNorm in training mode: parts then add up exactly."""
    config = configure(tmp_path, "--loss", "ce", "--batch-size", "90")
    config, splits = loaded(config)
    whole = start_training(config, splits, train.choose_runtime(config.run))
    cut = dataclasses.replace(config, optimization=dataclasses.replace(config.optimization, accumulate=4))
    parts = start_training(cut, splits, train.choose_runtime(cut.run))
    batch = next(iter(build.training_loader(config, splits, whole.runtime).epoch(0)))
    for training in (whole, parts):
        training.model.double().eval()
        training.optimizer = build_optimizer(training.config.optimization, training.model)  # its momentum double too
        train_step(training, dataclasses.replace(batch, views=(batch.views[0].double(),)))
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_gradients_are_clipped_when_asked(tmp_path: Path) -> None:
    config = configure(tmp_path, "--clip-grad-norm", "0.001")
    config, splits = loaded(config)
    training = start_training(config, splits, train.choose_runtime(config.run))
    train_step(training, next(iter(build.training_loader(config, splits, training.runtime).epoch(0))))
    norms = torch.stack([parameter.grad.norm() for parameter in training.model.parameters()])
    assert norms.norm() == pytest.approx(0.001, rel=1e-3)
