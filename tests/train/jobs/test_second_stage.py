"""The second stages on a classifier small enough to work by hand, and on a run of the digits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from rcl_fast.train import second_stage
from rcl_fast.train.config import parse
from rcl_fast.train.jobs import train
from rcl_fast.train.network.decoupled import ScaledClassifier, tau_normalized
from rcl_fast.train.report import results
from rcl_fast.train.rundir import checkpoints, status


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    classifier = nn.Linear(len(weight[0]), len(weight))
    classifier.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return classifier


def test_tau_norm_by_hand() -> None:
    classifier = linear([[3.0, 4.0], [0.0, 0.25], [0.0, 0.0]], [1.0, 2.0, 3.0])  # norms 5, 1/4 and 0
    assert tau_normalized(classifier, 0.0).weight.tolist() == [[3, 4], [0, 0.25], [0, 0]]
    torch.testing.assert_close(tau_normalized(classifier, 1.0).weight, torch.tensor([[0.6, 0.8], [0, 1.0], [0, 0]]))
    half = tau_normalized(classifier, 0.5)
    torch.testing.assert_close(half.weight, torch.tensor([[3 / 5**0.5, 4 / 5**0.5], [0, 0.5], [0, 0]]))
    assert half.bias.tolist() == [0, 0, 0]
    assert classifier.bias.tolist() == [1, 2, 3]  # a copy was made


def test_scales_merge_into_one_classifier_of_the_same_directions() -> None:
    classifier = nn.Linear(5, 4)
    scaled = ScaledClassifier(classifier)
    features = torch.randn(7, 5)
    assert [name for name, _ in scaled.named_parameters()] == ["scales"]
    torch.testing.assert_close(scaled(features), classifier(features))
    with torch.no_grad():
        scaled.scales.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    torch.testing.assert_close(scaled.merged()(features), scaled(features))
    cosines = nn.functional.cosine_similarity(scaled.merged().weight, classifier.weight)
    torch.testing.assert_close(cosines, torch.ones(4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on the digits; reports take longer than that."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_report", lambda *_: None)
        return train.run(parse(["--workers", "0", "--epochs", "2", "--loss", "ce", "--output", str(folder)]))


def second(finished: Path, output: Path, *arguments: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """metrics.json and the weights."""
    second_stage.main(["--run", str(finished), "--output", str(output), *arguments])
    found = json.loads((output / "metrics.json").read_text())
    return found, checkpoints.load(output / checkpoints.BEST)["model"]


def assert_backbone_kept(finished: Path, weights: dict[str, torch.Tensor]) -> None:
    before = checkpoints.load(finished / checkpoints.BEST)["model"]
    assert before.keys() == weights.keys()
    for name, tensor in before.items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, weights[name]), name  # BatchNorm's statistics too
    assert not torch.equal(before["classifier.weight"], weights["classifier.weight"])


@pytest.mark.usefixtures("without_reports")
def test_crt_trains_the_classifier_alone_and_again_to_the_same_bits(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, weights = second(finished, tmp_path / "one", "--method", "crt", "--epochs", "3")
    assert_backbone_kept(finished, weights)
    of_run = json.loads((finished / "metrics.json").read_text())
    assert found.keys() - of_run.keys() == {"second_stage"}
    assert found["last_epoch"] == 3
    assert found["second_stage"]["balanced_accuracy_before"] == pytest.approx(of_run["balanced_accuracy"])
    assert found["second_stage"]["lr"] == pytest.approx(0.2 * 64 / 512)
    assert (tmp_path / "one" / "per_class.csv").is_file()
    assert "before" in capsys.readouterr().out

    _, again = second(finished, tmp_path / "two", "--method", "crt", "--epochs", "3")
    assert torch.equal(again["classifier.weight"], weights["classifier.weight"])
    _, other = second(finished, tmp_path / "three", "--method", "crt", "--epochs", "3", "--seed", "1")
    assert not torch.equal(other["classifier.weight"], weights["classifier.weight"])


@pytest.mark.usefixtures("without_reports")
def test_lws_keeps_directions(finished: Path, tmp_path: Path) -> None:
    _, weights = second(finished, tmp_path / "lws", "--method", "lws", "--epochs", "2")
    assert_backbone_kept(finished, weights)
    before = checkpoints.load(finished / checkpoints.BEST)["model"]["classifier.weight"]
    ratio = weights["classifier.weight"] / before
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("without_reports")
def test_tau_is_selected_on_validation(finished: Path, tmp_path: Path) -> None:
    found, weights = second(finished, tmp_path / "tau", "--method", "tau_norm", "--tau-steps", "5")
    stage = found["second_stage"]
    tried = {float(tau): accuracy for tau, accuracy in stage["validation_balanced_accuracy"].items()}
    assert list(tried) == [0, 0.25, 0.5, 0.75, 1]
    assert tried[stage["tau"]] == max(tried.values())

    second_given, weights = second(finished, tmp_path / "given", "--method", "tau_norm", "--tau", "1")
    assert second_given["second_stage"]["tau"] == 1
    assert_backbone_kept(finished, weights)
    torch.testing.assert_close(weights["classifier.weight"].norm(dim=1), torch.ones(10))


def test_what_can_not_be_is_said(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str, folder: Path = finished) -> str:
        with pytest.raises(SystemExit) as stop:
            second_stage.main(["--run", str(folder), *arguments])
        return str(stop.value)

    assert "no config.json" in refused("--method", "crt", folder=tmp_path)
    assert "--tau is for --method tau_norm" in refused("--method", "crt", "--tau", "0.5")
    assert "--tau-steps is for --method tau_norm" in refused("--method", "lws", "--tau-steps", "5")
    of_training = ("--epochs", "3", "--lr", "0.1", "--seed", "1")
    assert "--epochs, --lr, --seed are for --method crt or lws" in refused("--method", "tau_norm", *of_training)
    assert "--tau gives the one" in refused("--method", "tau_norm", "--tau", "1", "--tau-steps", "3")
    for wrong, said in (("--lr nan", "a finite number"), ("--workers -3", "at least 0"), ("--momentum 1.5", "below 1")):
        assert f"must be {said}" in refused("--method", "crt", *wrong.split())
    assert "--device must be auto, cpu" in refused("--method", "crt", "--device", "gpu")
    inside = ("--data", str(tmp_path), "--output", str(tmp_path / "out"))
    assert "lies in the data" in refused("--method", "crt", *inside)
    changed = tmp_path / "cosine"
    shutil.copytree(finished, changed)
    settings = json.loads((changed / "config.json").read_text())
    settings["model"]["classifier"] = "cosine"
    (changed / "config.json").write_text(json.dumps(settings))
    assert "only --method crt is there for it" in refused("--method", "tau_norm", folder=changed)
    assert "only --method crt is there for it" in refused("--method", "lws", folder=changed)
    assert "classifier 'linear', not 'cosine'" in refused("--method", "crt", folder=changed)
    status.write(changed, "preempted")
    assert "is not finished (preempted)" in refused("--method", "crt", folder=changed)
    done = tmp_path / "done"
    done.mkdir()
    (done / "metrics.json").write_text("{}")
    assert "already holds results" in refused("--method", "crt", "--output", str(done))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("--method", "crt")
