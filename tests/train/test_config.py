"""Recipes, overrides, and what the command line says of mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from rcl_fast.train import config
from rcl_fast.train.arguments import ranges
from rcl_fast.train.config import parse, recipe
from rcl_fast.train.errors import UserError
from rcl_fast.train.options import Config, Dataset, Loss


@pytest.mark.parametrize("dataset", get_args(Dataset))
@pytest.mark.parametrize("loss", get_args(Loss))
def test_every_recipe_is_complete_for_every_loss(dataset: str, loss: str) -> None:
    found = recipe(dataset, loss)
    ranges.check(found)
    config.check(found)
    assert (found.data.dataset, found.loss.loss) == (dataset, loss)
    assert config.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_values_of_the_paper() -> None:
    cifar = recipe("cifar100_lt", "bcl_rcl")
    assert (cifar.optimization.epochs, cifar.optimization.lr, cifar.optimization.batch_size) == (200, 0.2, 256)
    assert (cifar.loss.alpha, cifar.loss.beta, cifar.loss.tau, cifar.loss.temperature) == (2.0, 1.0, 1.3, 0.1)
    assert [cifar.epoch_of(share) for share in cifar.optimization.milestones] == [160, 180]
    assert cifar.epoch_of(cifar.loss.compression_from) == 100
    assert (cifar.loss.compression_under, cifar.loss.compression_rest) == (1.0, 0.005)
    assert recipe("cifar100_lt", "bcl").loss.tau == 1.0
    assert recipe("cifar10_lt", "scl_rcl").loss == recipe("cifar100_lt", "scl_rcl").loss

    imagenet = recipe("imagenet_lt", "bcl_rcl")
    assert (imagenet.loss.alpha, imagenet.loss.beta, imagenet.loss.tau, imagenet.loss.temperature) == (1, 0.35, 1, 0.07)
    assert (imagenet.optimization.epochs, imagenet.optimization.schedule, imagenet.optimization.lr) == (
        90,
        "cosine",
        0.1,
    )
    assert (imagenet.model.classifier, imagenet.model.head_hidden, imagenet.model.head_out) == ("cosine", 2048, 1024)

    inaturalist = recipe("inaturalist18", "bcl")
    assert (inaturalist.optimization.lr, inaturalist.optimization.weight_decay) == (0.2, 1e-4)
    assert inaturalist.views.mean == (0.466, 0.471, 0.380)


def test_the_command_line_overrides_the_recipe() -> None:
    found = parse(
        ["--dataset", "cifar100_lt", "--data", "here", "--lr", "0.15", "--mean", ".1", ".2", ".3", "--compile"]
    )
    assert found.data.data == Path("here")
    assert found.optimization.lr == 0.15
    assert found.views.mean == (0.1, 0.2, 0.3)
    assert found.run.compile
    assert found.optimization.epochs == 200  # the recipe's


def test_the_loss_chooses_its_own_defaults_and_an_override_still_wins() -> None:
    assert parse(["--dataset", "cifar100_lt", "--loss", "bcl"]).loss.tau == 1.0
    assert parse(["--dataset", "cifar100_lt", "--loss", "bcl", "--tau", "1.3"]).loss.tau == 1.3
    assert parse(["--loss=ldam_drw"]).model.classifier == "cosine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--accumulate", "40"], "--accumulate must lie between 1 and half the batch size"),
        (["--temperature", "0"], "--temperature must be at least 1e-30, got 0"),
        (["--imbalance", "0.5"], "--imbalance must be at least 1"),
        (["--validation-fraction", "1"], "--validation-fraction"),
        (["--checkpoint-minutes", "-1"], "--checkpoint-minutes must be at least 0"),
        (["--timeout-minutes", "0"], "--timeout-minutes must be at least 0.01"),
        (["--loss", "ldam_drw", "--classifier", "linear"], "--classifier cosine"),
        (["--resume", "nowhere"], "no config.json there"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(arguments)


def test_help_shows_the_recipe_of_the_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--dataset", "imagenet_lt", "--help"])
    text = capsys.readouterr().out
    for part in (
        "data options",
        "model options",
        "loss options",
        "optimization options",
        "resnext50",
        "--dataset folder",
    ):
        assert part in text


def test_an_unknown_name_in_a_recipe_is_an_error() -> None:
    with pytest.raises(ValueError, match="no option 'learning_rate'"):
        config.from_dict({"optimization": {"learning_rate": 0.1}})
    with pytest.raises(ValueError, match="no section 'optimizer'"):
        config.from_dict({"optimizer": {}})


@pytest.mark.parametrize(
    ("arguments", "processes", "said"),
    [
        (["--batch-size", "100"], 8, r"--batch-size 100 is of all processes together .* 8: take 96 or 104"),
        (["--batch-size", "4"], 8, r"take 8 or more"),
        (["--batch-size", "64", "--accumulate", "16"], 4, r"4 processes and --accumulate 16: take at least 128"),
    ],
)
def test_a_batch_that_can_not_be_shared_is_explained(arguments: list[str], processes: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.check_shared(parse(arguments), processes)


@pytest.fixture
def earlier(tmp_path: Path) -> tuple[Path, Config]:
    saved = parse(["--loss", "scl", "--epochs", "7", "--output", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    return tmp_path, saved


def test_resuming_takes_the_earlier_configuration(earlier: tuple[Path, Config]) -> None:
    folder, saved = earlier
    found = parse(["--resume", str(folder), "--workers", "0", "--precision", "bf16"])
    assert (found.loss, found.optimization, found.views) == (saved.loss, saved.optimization, saved.views)
    assert (found.data.workers, found.run.precision) == (0, "bf16")
    assert found.run.resume == found.run.output == folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--epochs", "9"], r"--epochs \(was 7, now 9\)"),
        (["--lr", "0.5"], "--lr"),
        (["--loss", "bcl"], "--loss"),
        (["--seed", "1"], r"--seed \(was 0, now 1\)"),
        (["--imbalance", "5"], "--imbalance"),
        (["--arch", "resnet50"], "--arch"),
        (["--output", "elsewhere"], "--output"),
        (["--gradient-compression", "fp16"], "--gradient-compression"),
        (["--no-compression"], "--compression"),
    ],
)
def test_a_resumed_run_stays_the_run_it_was(earlier: tuple[Path, Config], change: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"start a new run to change .*{said}"):
        parse(["--resume", str(earlier[0]), *change])


def test_code_that_parses_arguments_gets_an_error_and_no_exit() -> None:
    assert config.config_of(["--loss", "ce"]) == parse(["--loss", "ce"])
    with pytest.raises(UserError, match=r"--los is no option of train/run\.py: did you mean --loss\?"):
        config.config_of(["--los", "ce"])


@pytest.mark.parametrize("text", ["{", '{"data": {"colour": 1}}', '{"optimizer": {}}', "[]"])
def test_a_configuration_that_can_not_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json can't be read as a run's configuration"):
        config.saved_config(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "COMMAND is one of run, verify, second-stage, sweep, reproduce"),
        (["trian"], 1, "there is no command 'trian'"),
        ([], 1, "python -m rcl_fast.train COMMAND"),
        (["second_stage", "--run", "nowhere", "--method", "crt"], 1, "nowhere: no config.json there"),
    ],
)
def test_the_commands_have_one_name_together(arguments: list[str], status: int, said: str) -> None:
    command = [sys.executable, "-m", "rcl_fast.train", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert ran.returncode == status
    assert said in (ran.stdout if status == 0 else ran.stderr)
    assert "Traceback" not in ran.stderr
