"""Every option at its worst values, by its name; other programs' names; and choices that don't go together."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rcl_fast.train import reproduce, sweep, verify
from rcl_fast.train.arguments import parsing, ranges, spellings
from rcl_fast.train.arguments.ranges import flag, hints, single, unwrapped
from rcl_fast.train.checks import check_arch, check_results_folder, without_effect
from rcl_fast.train.config import config_of, parse, recipe, saved_config
from rcl_fast.train.errors import UserError
from rcl_fast.train.network import ddp
from rcl_fast.train.options import Config, Range, ReproduceOptions, SecondStageOptions, SweepOptions, VerifyOptions
from rcl_fast.train.runtime.hardware import choose_runtime

OLD_RUN = Path(__file__).parents[1] / "data" / "run_of_6b8c554"
COMMANDS: dict[type, Any] = {
    Config: recipe("folder", "bcl_rcl"),
    SecondStageOptions: SecondStageOptions(Path("run"), "crt"),
    VerifyOptions: VerifyOptions(),
    SweepOptions: SweepOptions("digits_lt", Path("study"), ("tau=1",)),
    ReproduceOptions: ReproduceOptions(),
}
WORST: dict[type, tuple[Any, ...]] = {
    int: (-(10**30), -1, 0, 10**9, 10**30, 1.5, True, "many", None),
    float: (math.nan, math.inf, -math.inf, -1e300, -1, 0, 1.5, 10**400, 1e300, True, "1", None),
}
NUMBERS = [
    pytest.param(kind, name, id=f"{kind.__name__}.{name}")
    for kind in COMMANDS
    for name, hint in hints(kind).items()
    if single(hint)[0] in WORST
]


def replaced(options: Any, name: str, value: Any) -> Any:
    """The options with one of them replaced, in whichever section it is."""
    for field in dataclasses.fields(options):
        section = getattr(options, field.name)
        if field.name == name:
            return dataclasses.replace(options, **{name: value})
        if dataclasses.is_dataclass(section) and name in hints(section.__class__):
            return dataclasses.replace(options, **{field.name: replaced(section, name, value)})
    raise AssertionError(name)


def marks_of(hint: Any) -> list[Any]:
    """The ends of the range of an option's first value."""
    bare, marks = unwrapped(hint)
    inner = [part for part in getattr(bare, "__args__", ()) if part is not type(None)]
    return [*marks, *(marks_of(inner[0]) if inner else [])]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_a_number_has_a_range_and_its_worst_values_are_named_or_in_it(kind: type, name: str) -> None:
    hint, options = hints(kind)[name], COMMANDS[kind]
    marks = marks_of(hint)
    given = next(mark for mark in marks if isinstance(mark, Range))
    low, high = given.at_least or given.above or 0, given.at_most or given.below
    typed, optional = single(hint)
    before = next(value for of, value in ranges._values(options) if of == name)
    for worst in WORST[typed]:
        value = worst if not isinstance(before, tuple) else (worst, *before[1:])
        found = ranges.violations(replaced(options, name, value))
        is_number = isinstance(worst, (int, float) if typed is float else int) and not isinstance(worst, bool)
        if (is_number and low < worst < high) or (optional and worst is None):
            assert not found, worst
        elif not is_number or worst not in (low, high):
            assert len(found) == 1, worst
            assert found[0].startswith(flag(name)), worst
            assert " must " in found[0]


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_defaults_are_in_their_ranges(kind: type) -> None:
    ranges.check(COMMANDS[kind])
    assert parsing.tyro.conf.Positional not in hints(kind)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--clip-grad-norm -1", ["--clip-grad-norm must be at least 1e-09, got -1"]),
        ("--milestones 5 7", ["--milestones must each be at most 1, got 5 7"]),
        (
            "--lr nan --weight-decay -0.1",
            ["--lr must be a finite number, got nan", "--weight-decay must be at least 0"],
        ),
        ("--jitter 1 1 1 1", ["--jitter value 4 must be at most 0.5, got 1 1 1 1"]),
        ("--compression-threshold 20", ["--compression-threshold must be at most 1, got 20"]),
        ("--momentum 1", ["--momentum must be below 1"]),
        ("--seed -1", ["--seed must be at least 0"]),
        (
            "--epochs 3.5 --lr ten",
            ["--epochs must be a whole number, at least 1", "--lr must be a number, at least 1e-09"],
        ),
        ("--mean .1 .2", ["--mean takes 3 values, got .1 .2"]),
        ("--epochs", ["--epochs takes one value, got none"]),
        ("--output= --lr=", ["--output must be a path, got ''", "--lr must be a number, at least"]),
        ("--compile true", ["--compile takes no value: it is --compile or --no-compile"]),
        ("digits_lt", ["'digits_lt' stands without an option: did you mean --dataset digits_lt?"]),
        (
            "--learning-rate 1 --num_workers 2",
            ["--learning-rate is no option of train/run.py: it is --lr", "--workers"],
        ),
        ("--bs 4 --wd 1 --gpus 1 --if 100", ["--batch-size", "--weight-decay", "--device", "--imbalance"]),
        ("--optimizer sgd", ["--optimizer is no option of train/run.py: the optimiser is SGD"]),
        (
            "--dataset imagefolder --loss BCL+RCL",
            ["got imagefolder: did you mean folder?", "got BCL+RCL: did you mean bcl_rcl?"],
        ),
        ("--loss rcl --dataset CIFAR100-LT", ["did you mean scl_rcl?", "did you mean cifar100_lt?"]),
        ("--temprature 1", ["--temprature is no option of train/run.py: did you mean --temperature?"]),
        ("--arch resnet-50", ["--arch resnet-50: unknown", "did you mean resnet50?"]),
        ("--device gpu", ["--device must be auto, cpu, cuda, or like cuda:1, got gpu: did you mean cuda?"]),
        ("--milestones 0.9 0.8", ["--milestones must ascend, got 0.9 0.8"]),
        (
            "--schedule steps --milestones 0.01 0.9",
            ["--milestones 0.01 would come within the warm-up, --warmup-epochs 3: later ones, or 0"],
        ),
        ("--output \udce9", [r"--output \udce9: TensorBoard writes to no folder"]),
        ("--alpha 0 --loss ce", ["--alpha and --beta leave --loss ce nothing to minimise"]),
        ("--crop-scale 1 0.1", ["--crop-scale must be the smallest share, then the largest"]),
        ("--evaluation resize_center_crop --image-size 300", ["--resize 256 is less than --image-size 300"]),
        ("--randaugment rand-x", ["--randaugment rand-x: expected rand and parts of timm's"]),
    ],
)
def test_what_can_not_be_is_refused_by_name(arguments: str, said: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        config_of(arguments.split())
    assert [part for part in said if part not in str(refused.value)] == []


def test_values_of_every_form_are_read() -> None:
    found = parse(
        ["--output=my runs/a=b", "--milestones", ".5", "9e-1", "--weight_decay", "0", "--clip-grad-norm", "None"]
    )
    assert (found.run.output, found.optimization.milestones) == (Path("my runs/a=b"), (0.5, 0.9))
    assert (found.optimization.weight_decay, found.optimization.clip_grad_norm) == (0, None)


# Each with parts of what is said, one for each of its mistakes: there are as many lines.
MISTAKEN = [
    (
        "run --epochs 0 --lr abc --bs 3 --foo 1",
        ["--epochs must", "--lr must", "it is --batch-size", "--foo is no option"],
    ),
    (
        "run --epochs 0 --device cuda:01 --arch resnet-5",
        ["at least 1", "--device must be auto", "--arch resnet-5: unk"],
    ),
    ("run --warmup-epochs 3 --epochs 3 --alpha 0 --loss ce", ["3 must be less than --epochs 3", "nothing to minimise"]),
    ("run -lr 0.1 -b8 -j4", ["two dashes, --lr", "two dashes, --batch-size", "two dashes, --workers"]),
    ("run \u2014lr 1 \u2212\u2212tau 1 -\u2013x", ["write --lr", "write --tau", "write --x"]),
    (
        "run --epochs \u22123",
        ["--epochs takes one value, got none", "\u22123 begins with another dash than -: write -3"],
    ),
    ("run lr=0.1 help", ["'lr=0.1' stands without an option: did you mean --lr 0.1?", "did you mean --help?"]),
    ("run --version --optim.lr 3", ["rcl_fast.__version__", "it is --lr here"]),
    ("run --da plain --no-compil --", ["did you mean --dataset or --data?", "did you mean --no-compile?", "-- is no"]),
    ("run --fp16 --bf16 --beta1 1", ["--precision fp16", "--precision bf16", "the optimiser is SGD"]),
    ("run --resume=", ["--resume must be a path, got ''"]),
    ("run --mean .1 .2 2 --milestones x", ["value 3 must be at most 1, got .1 .2 2", "must be values, each a number"]),
    ("verify --on-bad-image skip --bs 3", ["it is one of train/run.py", "it is one of train/run.py"]),
    ("second_stage --loss ce", ["it is one of train/run.py", "needs --run, which", "one of crt, tau_norm, lws"]),
    (
        "sweep --grid --tau=1,2",
        ["--grid takes values, got none", "--grid has tau=VALUES", "needs --dataset", "needs --study"],
    ),
    ("sweep --dataset digits_lt --study s --grid tau=1 -- x --help", ["--help prints it", "'x' stands without"]),
    ("sweep --dataset digits_lt --study s --grid tau=1 --gpu 0", ["it is --devices here"]),
    ("reproduce --seed 3", ["--seeds N runs the seeds 0 to N - 1", "needs TABLE, which must be one of table1"]),
    ("reproduce --no-run table9 table2", ["TABLE must be one of", "'table2' stands without an option"]),
]


@pytest.mark.parametrize(("line", "said"), MISTAKEN)
def test_every_mistake_has_its_sentence_and_status_1(line: str, said: list[str]) -> None:
    command, *arguments = line.split()
    with pytest.raises(SystemExit) as stop:
        import_module(f"rcl_fast.train.{command}").main(arguments)
    lines = str(stop.value.code).split("\n")
    assert len(lines) == len(said)
    assert [part for part in said if not any(part in line for line in lines)] == []


def test_an_argument_without_an_option_is_found_among_options() -> None:
    found = reproduce.parse(["--no-run", "--seeds", "2", "table3", "--more", "--lr 0.2"])
    assert (found.table, found.options) == ("table3", ReproduceOptions(seeds=2, run=False, more="--lr 0.2"))
    assert reproduce.parse(["table1", "--only", "LC", "BCL", "--devices", "None"]).options.only == ("LC", "BCL")


def test_other_names_are_of_options_and_values_that_there_are() -> None:
    options = {name for kind in COMMANDS for name in hints(kind)}
    assert {*spellings._OPTIONS} <= options
    choices = {choice for kind in COMMANDS for hint in hints(kind).values() for choice in ranges.choices(hint)}
    assert {*spellings._VALUES} <= choices | {"resnet32", "resnet50", "resnext50"}


def test_data_without_a_data_set_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["--data", "here"]).data.dataset == parse(["--data=here"]).data.dataset == "folder"
    assert parse(["--data", "here", "--loss", "bcl"]) == parse(
        ["--dataset", "folder", "--data", "here", "--loss", "bcl"]
    )
    assert parse(["--data", "here", "--dataset", "cifar10_lt"]).data.dataset == "cifar10_lt"
    assert parse([]).data.dataset == "digits_lt"
    resumed = copied(tmp_path)
    assert parse(["--resume", str(resumed), "--data", "here"]).data.dataset == "digits_lt"
    asked: list[VerifyOptions] = []
    monkeypatch.setattr("rcl_fast.train.jobs.verify.verify", asked.append)
    verify.main(["--data", "here"])
    assert (asked[0].dataset, asked[0].data) == ("folder", Path("here"))


def copied(folder: Path, **changes: dict[str, Any]) -> Path:
    """A copy of an old run's config.json, with other values in its sections."""
    values = json.loads((OLD_RUN / "config.json").read_text())
    for section, options in changes.items():
        values[section].update(options)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimization": {"epochs": "many"}}, "--epochs must be a whole number, at least 1"),
        ({"optimization": {"epochs": None}}, "--epochs must be a whole number, .* got None"),
        ({"optimization": {"lr": [0.1]}}, "--lr must be a number, at least 1e-09, .* got 0.1"),
        ({"optimization": {"clip_grad_norm": -1}}, "--clip-grad-norm must be at least 1e-09, got -1"),
        ({"optimization": {"lr": math.nan}}, "--lr must be a finite number"),
        ({"views": {"mean": 0.5}}, "--mean must be 3 values"),
        ({"views": {"mean": [0.5]}}, "--mean must be 3 values"),
        ({"loss": {"loss": "rcl"}}, "--loss must be one of ce, .* got rcl"),
        ({"run": {"compile": "yes"}}, "--compile must be true or false, got yes"),
        ({"data": {"data": 3}}, "--data must be a path, got 3"),
    ],
)
def test_a_damaged_value_of_a_saved_run_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)config\.json can't be read as a run's configuration \({said}"):
        saved_config(copied(tmp_path / "run", **changes))


def test_a_section_that_is_none_or_lacks_an_option_is_named(tmp_path: Path) -> None:
    values = json.loads((OLD_RUN / "config.json").read_text())
    for changed, said in (
        ({**values, "data": None}, "DataOptions has its options by name, not None"),
        ({**values, "views": {}}, "ViewOptions needs 'image_size'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            saved_config(tmp_path)
    shutil.copy(OLD_RUN / "config.json", tmp_path)
    assert saved_config(tmp_path).optimization.epochs == 2


def test_results_lie_outside_the_data(tmp_path: Path) -> None:
    data, link = tmp_path / "data", tmp_path / "link"
    data.mkdir()
    link.symlink_to(data)
    for output in (data, data / "train" / "out", link / "out", data / ".." / "data" / "out"):
        with pytest.raises(UserError, match=r"--output .* lies in the data, .*: name a folder elsewhere"):
            parse(["--data", str(data), "--output", str(output)])
    for output in (tmp_path / "data2", data / ".." / "out", tmp_path):
        parse(["--data", str(data), "--output", str(output)])
    old = copied(data / "old", data={"dataset": "folder", "data": str(data)})
    assert parse(["--resume", str(old)]).run.output == old
    with pytest.raises(SystemExit, match=r"--study .* lies in the data"):
        sweep.main(["--dataset", "folder", "--data", str(data), "--study", str(data / "s"), "--grid", "tau=1"])
    check_results_folder("--output", None, data)
    check_results_folder("--output", data, None)


def test_options_without_effect_are_named() -> None:
    found = without_effect(config_of(["--loss", "ce", "--tau", "2"]), {"tau", "lr", "milestones", "beta"})
    assert found == [
        "--milestones: without effect with --schedule cosine",
        "--beta: without effect with --loss ce",
        "--tau: without effect with --loss ce",
    ]
    assert without_effect(config_of(["--schedule", "steps", "--milestones", "0.5"]), {"milestones", "tau"}) == []
    for_views = {"crop_scale", "jitter", "gray_probability", "workers", "data"}
    assert without_effect(config_of([]), for_views) == [
        "--workers: without effect with --loader auto, which is device here",
        "--crop-scale, --jitter: without effect with the views digits digits_sim digits_sim",
        "--gray-probability: without effect with the views digits digits_sim digits_sim",
    ]
    assert without_effect(config_of(["--data", "here"]), for_views) == []


def test_randaugment_is_what_timm_reads_to_its_end() -> None:
    transform = pytest.importorskip("timm.data.auto_augment").rand_augment_transform
    for text in (
        "rand",
        "rand-n2-m10-mstd0.5",
        "rand-m9-inc1-p0.3",
        "rand-m15-mmax20-n14",
        "rand-n14-tweights",
        "rand-t3a",
    ):
        config_of(["--randaugment", text])
        transform(text, {})
    for text in (
        *(
            "",
            "rnd-m9",
            "rand-",
            "rand-m",
            "rand-m9.5",
            "rand-m11",
            "rand-n15",
            "rand-p1.5",
            "rand-mstd.5",
            "rand-mstdinf",
        ),
        *("rand-inc2", "rand-tmine", "rand-m9-m10", "rand-m-1", "rand-foo", "rand m9", "rand-mmax0"),
    ):
        with pytest.raises(UserError, match="--randaugment"):
            config_of([f"--randaugment={text}"])


def test_an_architecture_of_timm_is_looked_up_with_names_that_are_near() -> None:
    check_arch("timm/resnet18")
    with pytest.raises(UserError, match=r"--arch timm/resnt18: timm .* has no such model; similar: resnet18"):
        check_arch("timm/resnt18")
    with pytest.raises(UserError, match=r"--arch resnet18: unknown; .* did you mean timm/resnet18\?"):
        check_arch("resnet18")


def test_synchronised_batchnorm_needs_a_gpu_with_one_process_too() -> None:
    config = parse(["--sync-batchnorm", "--device", "cpu"])
    with pytest.raises(UserError, match="--sync-batchnorm needs GPUs"):
        ddp.check(config, choose_runtime(config.run))


def test_values_of_an_option_that_takes_many_add_up_and_leave_the_table_its_name() -> None:
    given = reproduce.parse(["--only", "LC", "--rows", "a", "--only", "BCL", "CE", "--rows", "b", "c", "table1"])
    assert given.table == "table1"
    assert given.options.only == ("LC", "BCL", "CE")
    assert given.options.rows == (Path("a"), Path("b"), Path("c"))


@pytest.mark.parametrize("option", ["--rows", "--only", "--devices"])
def test_an_option_that_takes_many_values_takes_one_at_least(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} takes values, got none"):
        reproduce.parse(["table1", option])
