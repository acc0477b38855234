"""A run's network classifies images one by one as the run's own test did, as the README shows it."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from rcl_fast.metrics import per_class_accuracy
from rcl_fast.train import inference, trained
from rcl_fast.train.config import parse
from rcl_fast.train.errors import UserError
from rcl_fast.train.jobs import train
from rcl_fast.train.jobs.second_stage import second_stage
from rcl_fast.train.loaders import build
from rcl_fast.train.options import Config, SecondStageOptions
from rcl_fast.train.report import results

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """Of cross-entropy, for a second stage; in fp32 as `load_run` is; without a report."""
    config = parse(
        ["--loss", "ce", "--epochs", "12", "--device", "cpu", "--output", str(tmp_path_factory.mktemp("runs") / "run")]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_report", lambda *_: None)
        return train.run(config), config


@pytest.mark.usefixtures("without_tsne")
@pytest.mark.parametrize("stage", [None, "tau_norm"])
def test_images_are_classified_as_the_run_was_tested(finished: tuple[Path, Config], stage: str | None) -> None:
    folder, config = finished
    if stage is not None:
        folder = second_stage(SecondStageOptions(run=folder, method="tau_norm"))
    model, view, _ = inference.load_run(folder)
    test = build.load(config).test
    confusion = torch.zeros(10, 10)
    with torch.no_grad():
        for pixels, label in zip(test.images, test.labels, strict=True):
            logits = model.classifier(model.backbone(view(Image.fromarray(pixels))[None]))
            confusion[label, logits.argmax()] += 1
    metrics = json.loads((folder / "metrics.json").read_text())
    # One image of a class may be so near to a border that a batch of one decides otherwise than a larger one.
    expected = torch.tensor(metrics["per_class_accuracy"])
    assert (per_class_accuracy(confusion) - expected).abs().max() <= 1.5 / confusion.sum(dim=1).min()
    assert metrics["balanced_accuracy"] > 0.3, "the run has learned too little to tell"


def test_the_readmes_example_names_a_class(
    finished: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = finished
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "load_run" in code]
    file = tmp_path / "image.png"
    Image.fromarray(build.load(config).test.images[0]).save(file)
    exec(code.replace("runs/NAME", str(folder)), {"Path": Path, "Image": Image, "file": file})
    with (folder / "per_class.csv").open() as rows:
        names = [row["class"] for row in csv.DictReader(rows)]
    assert capsys.readouterr().out.strip() in names
    assert inference.load_run(folder).class_names == names


def test_a_folder_that_is_no_runs_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config"):
        inference.load_run(tmp_path)


@pytest.mark.parametrize("state", [{"x": 1}, [1], {"model": {"x": torch.ones(1)}}])
def test_a_file_that_is_no_checkpoint_is_said(finished: tuple[Path, Config], state: object) -> None:
    torch.save(state, finished[0] / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is no checkpoint of a run"):
        inference.load_run(str(finished[0]), "other.pt")


def test_the_earlier_name_still_loads_and_names_the_new_one(finished: tuple[Path, Config]) -> None:
    with pytest.warns(DeprecationWarning, match="load_run"):
        assert trained.load(finished[0]).class_names == inference.load_run(finished[0]).class_names
