"""Whole runs on few small images: what is trained, written, resumed, and said when something is wrong."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
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
from rcl_fast.train.jobs import train
from rcl_fast.train.loaders import build
from rcl_fast.train.loaders.base import Batch, fingerprint
from rcl_fast.train.loop import engine
from rcl_fast.train.loop.step import train_step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.network.optimization import build_optimizer
from rcl_fast.train.options import Config
from rcl_fast.train.rundir import checkpoints

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
    return parse(["--workers", "0", "--batch-size", "100", "--output", str(output), *arguments])


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
@pytest.mark.parametrize("epoch", [0, 3])  # with no epoch done; after compression has begun
def test_ctrl_c_leaves_a_report_and_a_checkpoint_that_goes_on_as_if_nothing_happened(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_in_epoch(epoch, patch)
        train.run(configure(folder, "--epochs", "4"))
    assert metrics(folder)["interrupted"]
    assert metrics(folder)["last_epoch"] == epoch
    assert (folder / "report.html").exists()

    train.run(parse(["--resume", str(folder)]))
    assert metrics(folder)["last_epoch"] == 4
    assert_same_weights(finished, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


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


@pytest.mark.usefixtures("without_reports")
def test_a_damaged_checkpoint_is_named_and_the_run_ends_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / checkpoints.LAST).write_bytes((folder / checkpoints.LAST).read_bytes()[:5000])
    train.run(parse(["--resume", str(folder)]))
    said = capsys.readouterr().out
    assert "last.pt is damaged" in said
    assert "going on from the one before, previous.pt" in said
    assert_same_weights(finished, folder)


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
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be written .*choose another folder with --output"):
        train.run(configure(tmp_path / "file" / "run"))


def test_another_run_is_never_written_over(finished: Path) -> None:
    with pytest.raises(UserError, match="already holds a run: go on with --resume"):
        train.run(configure(finished))


def test_resuming_after_the_data_changed_on_disk_is_refused(tmp_path: Path) -> None:
    write_image_lists(tmp_path)
    folder = train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path)))
    before = (folder / checkpoints.LAST).read_bytes()
    train_list = tmp_path / "ImageNet_LT_train.txt"
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
@pytest.mark.parametrize("interrupted", [checkpoints.LAST, checkpoints.BEST])
def test_ctrl_c_while_a_checkpoint_is_written_reports_what_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    save = checkpoints.save

    def interrupting(path: Path, state: dict, *previous: Path | None) -> None:
        if path.name == interrupted and state["epoch"] == 1:
            raise KeyboardInterrupt
        save(path, state, *previous)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", interrupting)
        train.run(configure(folder, "--epochs", "2"))
    on_disk = checkpoints.load(folder / checkpoints.LAST)["epoch"]
    assert metrics(folder)["last_epoch"] == on_disk == (0 if interrupted == checkpoints.LAST else 1)
    train.run(parse(["--resume", str(folder)]))
    assert checkpoints.load(folder / checkpoints.BEST)["epoch"] == metrics(folder)["best_epoch"]


def test_a_bad_test_image_loses_no_training(tmp_path: Path) -> None:
    write_image_lists(tmp_path)
    (tmp_path / "ImageNet_LT_test.txt").write_text("missing.png 0\n")
    with pytest.raises(UserError, match=r"(?s)missing\.png .*Training is done: mend this, then --resume"):
        train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path)))
    (tmp_path / "ImageNet_LT_test.txt").write_text("images/n000 é/0.png 0\n")
    train.run(parse(["--resume", str(tmp_path / "run")]))
    assert (tmp_path / "run" / "report.html").exists()


def test_images_of_another_size_are_named(tmp_path: Path) -> None:
    write_image_lists(tmp_path)
    with pytest.raises(UserError, match=r"line 1\): it has 50x40 pixels, and --evaluation as_is expects 32x32"):
        train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path), "--evaluation", "as_is"))


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.time, "strftime", lambda _: "20260101-000000")
    config = parse([])
    assert [train._prepare_folder(config, ExitStack()).name for _ in range(2)] == [
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


IMAGENET = ("--dataset", "imagenet_lt", "--arch", "timm/resnet10t", "--epochs", "1", "--batch-size", "4")
SMALL = ("--image-size", "32", "--resize", "36", "--head-hidden", "32", "--head-out", "16")


def test_imagenet_lists_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_lists(tmp_path)
    folder = train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path)))
    assert metrics(folder)["selected_on"] == "validation (the data set's own)"
    said = capsys.readouterr().out
    assert "115,846" in said  # the published size, which these lists do not have
    assert "report.html" in said


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_missing_image_is_named_with_its_line(tmp_path: Path, loader: str) -> None:
    write_image_lists(tmp_path)
    (tmp_path / "images/n001 é/2.png").unlink()
    with pytest.raises(UserError, match=r"n001 é/2\.png \(ImageNet_LT_train\.txt, line 9\): there is no such file"):
        train.run(configure(tmp_path / "run", *IMAGENET, *SMALL, "--data", str(tmp_path), "--loader", loader))


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_bad_images_are_left_out_when_asked(tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the manifest knows before the run, and one that went bad after it was written."""
    write_image_lists(tmp_path)
    (tmp_path / "images/n000 é/3.png").write_bytes(b"")
    arguments = (*IMAGENET, *SMALL, "--data", str(tmp_path), "--loader", loader)
    with pytest.raises(UserError, match=r"(?s)no manifest .*python train/verify\.py --dataset imagenet_lt"):
        train.run(configure(tmp_path / "run", *arguments, "--on-bad-image", "skip"))
    assert verify.main(["--dataset", "imagenet_lt", "--data", str(tmp_path), "--workers", "1"]) == 1
    with pytest.raises(UserError, match=r"(?s)1 of 12 images are bad.*--on-bad-image skip"):
        train.run(configure(tmp_path / "run", *arguments))
    (tmp_path / "images/n001 é/2.png").write_bytes(b"damaged since")
    capsys.readouterr()
    folder = train.run(configure(tmp_path / "run", *arguments, "--on-bad-image", "skip", "--epochs", "2"))
    said = capsys.readouterr().out
    assert said.count("1 bad images left out") == 3  # train, validation, test
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
