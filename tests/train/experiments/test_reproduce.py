"""The tables as declared, the runs behind them and their names, what is gathered and shown, and one real tiny run."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich
import torch

from rcl_fast.train.config import parse
from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments import clusters, job_queue, render, reproduce, runs
from rcl_fast.train.experiments.cells import cell as cell_of
from rcl_fast.train.experiments.job_queue import Job
from rcl_fast.train.experiments.plan import Plan, dry, missing_runs, plan, read_rows, run_missing, unique
from rcl_fast.train.experiments.reproduce import table_of
from rcl_fast.train.experiments.rows import row_of
from rcl_fast.train.experiments.runs import Run
from rcl_fast.train.experiments.setting import Setting, adapt, flags, run_id
from rcl_fast.train.experiments.show import file_name, fill
from rcl_fast.train.experiments.tables import COMPRESSION, METRICS, TABLES, Column, Row, Table
from rcl_fast.train.network.objective import Objective, compress
from rcl_fast.train.options import ReproduceOptions
from rcl_fast.train.reproduce import _DESCRIPTION, Command
from rcl_fast.train.reproduce import parse as parse_command
from rcl_fast.train.rundir import status

# As the project's sources have them: CIFAR-10-LT and CIFAR-100-LT at IF 100 / 50 / 10, harmonic means at 100.
SOURCES = """
LC      | 81.2 / – / –       | 44.0 / – / –       | 80.5 / 35.2
SCL     | 83.5 / – / –       | 51.1 / – / –       | 83.1 / 39.2
BCL     | 84.3 / 87.2 / 91.1 | 51.9 / 56.6 / 64.9 | 83.7 / 40.2
SCL+RCL | 86.0 / 88.5 / 91.7 | 52.2 / 56.8 / 65.6 | 85.3 / 42.4
BCL+RCL | 86.2 / 88.4 / 92.0 | 52.1 / 56.0 / 65.4 | 85.7 / 41.1
"""


def sources() -> dict[str, list[list[float]]]:
    lines = [[part.strip() for part in line.split("|")] for line in SOURCES.strip().splitlines()]
    return {name: [[float(n) for n in part.split(" / ") if n != "–"] for part in parts] for name, *parts in lines}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are then not folded."""
    monkeypatch.setattr(rich.get_console(), "_width", 300)


def options(tmp_path: Path, table: Any = "table1", **changes: Any) -> Command:
    return Command(
        table, ReproduceOptions(**{"folder": tmp_path / "runs", "data": tmp_path / "data", "seeds": 2, **changes})
    )


def planned(given: Command) -> tuple[Table, Plan]:
    table, how = table_of(given.table, given.options), given.options
    return table, plan(table, Setting(how.dataset, how.epochs, how.validate_on), how)


def call(given: Command) -> str:
    """What it prints, wrapped or not; every run must end well."""
    with rich.get_console().capture() as printed:
        failures = reproduce.reproduce(table_of(given.table, given.options), given.options)
    assert not failures or not given.options.run, printed.get()
    return " ".join(printed.get().split())


def keys(table: str, tmp_path: Path, **changes: Any) -> set[str]:
    return {entry.run.id for entry in unique(planned(options(tmp_path, table, **changes))[1])}


def finish(run: Run, **found: Any) -> None:
    """A folder as a finished run leaves it, as far as tables read it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps(run.config.to_dict()))
    metrics = {
        "balanced_accuracy": 0.8,
        "last_epoch_balanced_accuracy": 0.79,
        "harmonic_mean": 0.7,
        "last_epoch_harmonic_mean": 0.69,
        "best_epoch": 3,
        "last_epoch": run.config.optimization.epochs,
        "selected_on": "test (as the literature does)",
        "interrupted": False,
        **found,
    }
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    status.write(run.folder, "finished")


def begin(run: Run) -> None:
    """A folder as a run leaves it that was stopped."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(run.config.to_dict()))
    (run.folder / "last.pt").touch()


# The tables as declared.


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_is_well_formed(table: Table) -> None:
    assert all(column.metric in METRICS for column in table.columns)
    for row in table.rows:
        assert len(row.paper) in (0, len(table.columns)), row.label
        assert row.options is None or parse(flags({**table.columns[0].options, **row.options})).loss.loss
    for column in table.columns:
        assert parse(flags({**column.options, **(table.rows[0].options or {})})).data.dataset
    blocks = [row.block for row in table.rows]
    assert [b for n, b in enumerate(blocks) if not n or blocks[n - 1] != b] == list(dict.fromkeys(blocks))


def test_the_papers_numbers_are_those_of_the_sources() -> None:
    for name, (cifar10, cifar100, harmonic) in sources().items():
        found = {table: [row.paper for row in TABLES[table].rows if row.label == name] for table in TABLES}
        assert found["table1"] == [(cifar10[0], cifar100[0]), ()]  # the second is ours alone: all but the loss equal
        assert found["table2"] == [tuple(harmonic), ()]
        assert len(cifar10) == 1 or found["table3"] == [(*cifar10, *cifar100)]
    paper = {row.label: row.paper for row in TABLES["table3"].rows}
    assert paper["best published elsewhere"] == (86.1, 88.2, 92.0, 53.2, 57.6, 65.7)
    assert paper["CE"] == paper["RIDE"] == (None,) * 6
    assert [row.paper for row in TABLES["table4"].rows if row.paper][:2] == [(56.2, 57.4), (56.3, 57.5)]
    assert [row.paper for row in TABLES["table5"].rows] == [(3963, 0.97, 84, 4.1), (4092, 0.94, 106, 4.0)] * 2


def test_rows_run_as_the_paper_sets_them_and_with_everything_else_equal(tmp_path: Path) -> None:
    table, entries = planned(options(tmp_path))
    by_block: dict[str, list[Any]] = {}
    for row, cells in zip(table.rows, entries, strict=True):
        by_block.setdefault(row.block, []).append(cells[1][0].run.config)
    paper, equal = by_block.values()
    assert [config.loss.tau for config in paper] == [1.0, 1.0, 1.0, 1.3, 1.3]
    assert [config.loss.alpha for config in paper] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert {(c.loss.alpha, c.loss.beta, c.loss.tau, c.optimization, c.views, c.model) for c in equal} == {
        (2.0, 1.0, 1.3, equal[0].optimization, equal[0].views, equal[0].model)
    }
    assert not any(c.loss.compression for c in equal if c.loss.loss.endswith("_rcl"))
    assert all(c.data.validate_on == "test" and c.optimization.epochs == 200 for c in paper + equal)


def test_the_compression_ablation_has_both_readings_and_a_factor_above_one() -> None:
    readings = [parse(flags({"dataset": "cifar100_lt", **row.options})).loss for row in COMPRESSION.rows[4:]]
    assert [(r.compression, r.compression_under, r.compression_rest) for r in readings] == [
        (False, 1.0, 0.005),
        (True, 1.0, 0.005),
        (True, 0.005, 1.0),
        (True, 2.0, 1.0),
    ]


# The names of runs.


def test_tables_share_their_runs(tmp_path: Path) -> None:
    first = keys("table1", tmp_path)
    assert len(first) == 5 * 2 * 2 * 2  # losses, blocks, data sets, seeds: no two the same
    assert keys("table2", tmp_path) == first
    assert keys("table5", tmp_path) < first
    assert keys("figure3", tmp_path) < first
    assert len(keys("table3", tmp_path) & first) == 4 * 2 * 2  # LogitAdjust is LC; BCL, SCL+RCL, BCL+RCL
    assert len(keys("compression", tmp_path) & first) == 4 * 2 * 2  # both losses off, and at 4.3's reading
    assert keys("table3", tmp_path, only=("Decoupled: cRT",)) == keys("table3", tmp_path, only=("CE",))
    assert len(keys("table4", tmp_path)) == 3 * 2 * 2  # BCL compresses nothing: its two rows are one run


def test_a_run_is_named_by_what_it_computes() -> None:
    base = ["--dataset", "cifar100_lt", "--loss", "bcl_rcl", "--validate-on", "test"]
    name = run_id(parse(base))
    elsewhere = ["--data", "x", "--output", "y", "--device", "cpu", "--workers", "0", "--compile"]
    assert run_id(parse(base + elsewhere)) == name
    others = [["--seed", "1"], ["--tau", "1"], ["--epochs", "9"], ["--imbalance", "10"], ["--precision", "fp16"]]
    assert len({name, *(run_id(parse(base + other)) for other in others)}) == 1 + len(others)
    # This name is that of results that people have: if it changes, tables no longer find their runs.
    assert name == "322f71ff34fd"


def test_a_replaced_data_set_takes_each_setting_once_and_drops_the_papers_numbers(tmp_path: Path) -> None:
    table = adapt(TABLES["table3"], "digits_lt")
    assert [column.options for column in table.columns] == [
        {"dataset": "digits_lt", "imbalance": factor} for factor in (100, 50, 10)
    ]
    assert not any(row.paper for row in table.rows)
    assert [c.options for c in adapt(TABLES["table4"], "digits_lt").columns] == [{"dataset": "digits_lt"}]
    assert Setting("digits_lt", 2).words(TABLES["table3"]) == [
        "digits_lt in place of the paper's data sets",
        "2 epochs",
    ]


def test_one_of_the_tables_own_data_sets_keeps_its_numbers() -> None:
    table = adapt(TABLES["table3"], "cifar100_lt")
    assert [column.options["imbalance"] for column in table.columns] == [100, 50, 10]
    assert {row.label: row.paper for row in table.rows}["BCL"] == (51.9, 56.6, 64.9)
    assert Setting("cifar100_lt").words(TABLES["table3"]) == []


def test_several_data_sets_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "cifar10_lt").mkdir()
    _, entries = planned(options(tmp_path, data=tmp_path))
    assert [cell[0].run.data for cell in entries[0]] == [tmp_path / "cifar10_lt", tmp_path]


# What is there, and what is to be done.


def test_a_half_done_set_goes_on_where_it_stopped(tmp_path: Path) -> None:
    given = options(tmp_path, dataset="digits_lt", epochs=3, only=("LC",), data=None)
    _, entries = planned(given)
    everything = list(unique(entries))
    assert [entry.run.config.run.seed for entry in everything] == [0, 0, 1, 1]
    done, half, *rest = [entry.run for entry in everything]
    finish(done)
    begin(half)
    assert [runs.state(run) for run in (done, half, *rest)] == ["finished", "half done", "missing", "missing"]
    commands = dry(entries, {}, 1)
    assert len(commands) == 3
    assert f"--resume {half.folder}" in commands[0]
    assert "--loss logit_adjusted --epochs 3 --seed 1" in commands[1]
    assert f"--output {rest[0].folder}" in commands[1]
    assert "--nproc-per-node 4" in dry(entries, {}, 4)[0]


def test_an_interrupted_or_shorter_run_is_not_finished(tmp_path: Path) -> None:
    run = next(unique(planned(options(tmp_path))[1])).run
    for found in ({"interrupted": True}, {"last_epoch": 12}):
        finish(run, **found)
        assert runs.state(run) == "missing"
        assert row_of(run) is None


def test_a_run_that_failed_after_its_figures_is_not_finished(tmp_path: Path) -> None:
    run = next(unique(planned(options(tmp_path))[1])).run
    finish(run)
    (run.folder / "last.pt").touch()
    status.write(run.folder, "failed")  # as where the disk was full at the report
    assert runs.state(run) == "half done"
    assert row_of(run) is None


def test_a_half_done_run_goes_on_as_it_is_to_be_computed_now(tmp_path: Path) -> None:
    """It may have failed in what it was begun with."""
    given = options(tmp_path, only=("BCL",), dataset="cifar10_lt", seeds=1)
    table = table_of(given.table, given.options)

    def planned(*more: str) -> Run:
        return next(unique(plan(table, Setting("cifar10_lt", more=more), given.options))).run

    begin(planned("--cuda-graph", "--compile"))
    now = runs.command(planned("--compile", "--device", "cpu"))
    assert now[-4:] == ["--device", "cpu", "--data", str(tmp_path / "data")]
    assert "--no-cuda-graph" in now
    assert "--compile" not in now  # as it was
    resumed = parse(now[2:])
    assert (resumed.run.cuda_graph, resumed.run.compile, resumed.run.device) == (False, True, "cpu")


def test_a_folder_of_other_values_is_not_taken_for_the_run(tmp_path: Path) -> None:
    run = next(unique(planned(options(tmp_path))[1])).run
    finish(run)
    saved = json.loads((run.folder / "config.json").read_text())
    saved["optimization"]["lr"] = 0.123
    saved["data"]["loader"] = "device"  # what auto became
    (run.folder / "config.json").write_text(json.dumps(saved))
    assert runs.state(run) == "unusable"
    assert "a run of other values (--lr 0.123 there, 0.2 now): move" in str(runs.problem(run))


def test_the_parts_of_an_array_are_the_same_whatever_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[str] = []

    def at_once(jobs: list[Job], *_: Any) -> list[job_queue.Failure]:
        queued.extend(job.folder.name for job in jobs)
        for run in (entry.run for entry in unique(planned(given)[1])):
            if run.folder.name in queued:
                finish(run)
        return []

    monkeypatch.setattr(job_queue, "run_all", at_once)
    given = options(tmp_path, dataset="digits_lt", epochs=3)
    for part in ("2/3", "1/3", "3/3"):
        assert "run the command without --part to show the table" in call(
            Command(given.table, dataclasses.replace(given.options, part=part))
        )
    assert len(queued) == len(set(queued)) == 20


def test_known_rows_are_not_run_again(tmp_path: Path) -> None:
    given = options(tmp_path, "figure3", dataset="digits_lt", seeds=1)
    _, entries = planned(given)
    first, second = unique(entries)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"key": first.run.id, "second_stage": None, "balanced_accuracy": 0.5}) + "\n")
    known = read_rows((file,))
    assert missing_runs(entries, known) == [second.run]
    file.write_text("not JSON")
    with pytest.raises(UserError, match="no file of rows"):
        read_rows((file,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"part": "9/8"}, "--part is I/N"),
        ({"part": "x"}, "--part is I/N"),
        ({"part": "0/0"}, "--part is I/N"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"only": ("RCL",)}, "no such row; it has 'LC', 'SCL'"),
        ({"more": "--lr '0.1"}, "ends within a quotation"),
        ({"more": "--lr 0.1 --seed 3"}, "--seed can't be in it; give --seeds"),
        ({"more": "--loss ce"}, "--loss can't be in it; it is each row's own"),
        ({"more": "--epochs 3", "epochs": 2}, "--epochs can't be in it; --epochs is given, too"),
        ({"more": "--lr 0"}, "--lr must be at least 1e-09"),
        ({"more": "--learning-rate 0"}, "it is --lr here"),
        ({"devices": ("63",)}, "--devices 63: there are"),
        ({"data": Path("/")}, "--folder .* lies in the data"),
        ({"data": None}, "say where it is with --data DIR"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(options(tmp_path, **changes))


def test_to_show_a_table_that_is_not_complete_is_no_success(tmp_path: Path) -> None:
    given = options(tmp_path, "figure3", run=False, seeds=1, dataset="cifar10_lt")
    _, entries = planned(given)
    first, second = unique(entries)
    for missing, run in ((2, first.run), (1, second.run)):
        (failure,) = reproduce._not_run(entries, {}, given.options)
        assert f"{missing} of 2 runs" in failure.job.label
        finish(run)
    assert not reproduce._not_run(entries, {}, given.options)


_DOCUMENT = (Path(__file__).parents[3] / "docs" / "reproduction.md").read_text(encoding="utf-8")
COMMANDS = [
    command.replace("$SLURM_ARRAY_TASK_ID", "8")
    for command in re.findall(r"^(?:  |python )train/reproduce\.py (.*?)(?: {2,}.*)?$", _DOCUMENT + _DESCRIPTION, re.M)
]


def test_the_commands_of_document_and_help_parse() -> None:
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        given = parse_command(shlex.split(command))
        assert given.options.data == Path("DIR") or given.options.dataset == "digits_lt"


# From rows to figures.


def test_means_spreads_and_distances_from_the_paper() -> None:
    row, column = Row("BCL", {}, (84.3,)), Column({"dataset": "cifar10_lt"})
    found = [{"balanced_accuracy": value, "last_epoch_balanced_accuracy": value - 0.01} for value in (0.84, 0.86)]
    cell = cell_of(row, column, 0, found, in_papers_setting=True)
    assert cell.best is not None
    assert (cell.best.mean, cell.best.deviation, cell.best.seeds) == pytest.approx((85.0, 2**0.5, 2))
    assert (cell.off, cell.last_off) == pytest.approx((0.7, -0.3))
    elsewhere = cell_of(row, column, 0, found, in_papers_setting=False)
    assert (elsewhere.off, elsewhere.last_off) == (None, None)
    one = cell_of(row, column, 0, found[:1], in_papers_setting=True).best
    assert one is not None
    assert one.deviation is None
    assert cell_of(row, column, 0, [], in_papers_setting=True)[:3] == (84.3, 0, None)


@pytest.mark.parametrize("paper", [None, "57.3-58.5"])
def test_there_is_no_distance_from_what_is_no_number(paper: str | None) -> None:
    cell = cell_of(Row("x", {}, (paper,)), Column({"dataset": "cifar10_lt"}), 0, [{"balanced_accuracy": 0.5}], True)
    assert cell.off is None


def shown(given: Command) -> tuple[str, dict, list[dict]]:
    """What a table prints, its JSON and its rows, training nothing."""
    text = call(Command(given.table, dataclasses.replace(given.options, run=False)))
    (file,) = (given.options.folder / "tables").glob("*.json")
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    return text, json.loads(file.read_text()), [json.loads(line) for line in lines]


def test_a_table_shows_the_paper_beside_ours(tmp_path: Path) -> None:
    given = options(tmp_path, only=("BCL",))
    for entry in unique(planned(given)[1]):
        seed = entry.run.config.run.seed
        finish(entry.run, balanced_accuracy=(0.84, 0.86)[seed], last_epoch_balanced_accuracy=0.83)
        if seed == 1 and entry.run.config.data.dataset == "cifar100_lt":
            (entry.run.folder / "metrics.json").unlink()
    text, table, rows = shown(given)
    for part in ("84.3", "85.0 ± 1.4 (+0.7)", "last 83.0 ± 0.0 (-1.3)", "1 of 2 seeds", "Epochs selected on: test"):
        assert part in text, part
    assert "NOT THE PAPER'S SETTING" not in text
    assert table["rows"][0]["cells"][0]["off"] == pytest.approx(0.7)
    assert {(row["seed"], row["dataset"]) for row in rows} == {
        (0, "cifar10_lt"),
        (1, "cifar10_lt"),
        (0, "cifar100_lt"),
    }
    assert all(row["key"] and row["commit"] and row["arguments"] for row in rows)


def test_options_that_only_say_how_runs_are_computed_leave_the_setting_the_papers() -> None:
    how = Setting(more=("--cuda-graph", "--compile", "--device", "cpu"))
    assert how.words(TABLES["table1"]) == []
    what = Setting(more=("--cuda-graph", "--lr", "0.1"))
    assert what.words(TABLES["table1"]) == ["--cuda-graph --lr 0.1"]
    given = ReproduceOptions()
    plain, faster, other = (
        {entry.run.id for entry in unique(plan(TABLES["table1"], setting, given))} for setting in (Setting(), how, what)
    )
    assert plain == faster
    assert plain.isdisjoint(other)


@pytest.mark.parametrize(
    "more", ["--lr 0.1", "--batch-size 64", "--tau 1.3", "--schedule cosine", "--warmup-epochs 3", "--imbalance 20"]
)
def test_the_recipe_of_another_data_set_is_another_setting(more: str) -> None:
    setting = Setting(dataset="cifar100_lt", more=tuple(more.split()))
    assert setting.words(TABLES["table1"]) == [more]
    table = adapt(TABLES["table1"], "cifar100_lt")
    assert file_name(table, setting, ()) == "table1-cifar100_lt-more"


def test_the_papers_own_values_are_its_setting() -> None:
    setting = Setting(epochs=200, validate_on="test", more=("--lr", "0.2", "--batch-size", "256"))
    assert setting.words(TABLES["table1"]) == []
    assert file_name(TABLES["table1"], setting, ()) == "table1"


def test_a_call_with_fewer_seeds_or_rows_loses_none(tmp_path: Path) -> None:
    given = options(tmp_path, dataset="cifar10_lt", only=("LC", "BCL"))
    for entry in unique(planned(given)[1]):
        finish(entry.run)
    everything = dataclasses.replace(given.options, only=(), run=False)
    name = given.options.folder / "tables" / "table1-cifar10_lt"
    rows = name.with_name(name.name + ".jsonl")
    call(dataclasses.replace(given, options=everything))
    before = set(rows.read_text().splitlines())
    assert len(before) == 4 * 2  # LC, BCL, both also with all else equal, two seeds
    call(dataclasses.replace(given, options=dataclasses.replace(everything, seeds=1)))
    assert set(rows.read_text().splitlines()) == before
    call(dataclasses.replace(given, options=dataclasses.replace(everything, only=("BCL",))))
    assert set(rows.read_text().splitlines()) == before
    assert len(name.with_name(name.name + "-only.jsonl").read_text().splitlines()) == 4


def test_another_setting_is_marked_and_keeps_away_from_the_real_table(tmp_path: Path) -> None:
    given = options(tmp_path, dataset="digits_lt", epochs=2, only=("BCL",), seeds=1)
    for entry in unique(planned(given)[1]):
        finish(entry.run)
    text, table, rows = shown(given)
    assert "NOT THE PAPER'S SETTING: digits_lt in place of the paper's data sets, 2 epochs" in text
    assert "84.3" not in text
    assert table["not_the_papers_setting"] == rows[0]["not_the_papers_setting"]
    assert (given.options.folder / "tables" / "table1-digits_lt-2epochs-only.md").exists()


def test_rows_without_runs_say_why(tmp_path: Path) -> None:
    given = options(tmp_path, "table3", only=("RIDE", "Decoupled: cRT", "CE", "best published elsewhere"))
    shown(given)
    lines = (given.options.folder / "tables" / "table3-only.md").read_text().splitlines()
    by_label = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    assert by_label["RIDE"].count("not in our sources | not built") == 6
    assert by_label["Decoupled: cRT"].count("not in our sources | not run") == 6
    assert by_label["CE"].count("not in our sources | not run") == 6
    assert "86.1 | – |" in by_label["best published elsewhere"]


def test_second_stages_run_on_finished_runs_and_give_rows(tmp_path: Path) -> None:
    given = options(tmp_path, "table3", only=("Decoupled: cRT",), dataset="cifar10_lt", seeds=1)
    _, entries = planned(given)
    run = entries[0][0][0].run
    finish(run)
    stage = [line for line in dry(entries, {}, 1) if "second_stage.py" in line]
    assert len(stage) == 3
    assert f"--run {run.folder} --method crt" in stage[0]
    folder = run.folder / "second_stage" / "crt"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"balanced_accuracy": 0.77, "selected_on": "test"}))
    assert len([line for line in dry(entries, {}, 1) if "second_stage.py" in line]) == 2
    _, table, rows = shown(given)
    assert table["rows"][0]["cells"][0]["best"]["mean"] == pytest.approx(77.0)
    assert rows[0]["second_stage"] == "crt"


def test_a_second_stage_on_a_training_that_is_only_a_row_is_said(tmp_path: Path) -> None:
    given = options(tmp_path, "table3", only=("Decoupled: cRT",), dataset="digits_lt", seeds=1, data=None)
    _, entries = planned(given)
    rows = tmp_path / "rows.jsonl"
    keys = {entry.run.id for entry in unique(entries)}
    rows.write_text("".join(json.dumps({"key": key, "second_stage": None, "seed": 0}) + "\n" for key in keys))
    failures = run_missing(entries, read_rows([rows]), given.options)
    assert len(failures) == len(keys)
    assert all("only the row is here" in failure.why for failure in failures)


def test_the_groups_of_the_compression_rule_are_read_from_what_the_run_said(tmp_path: Path) -> None:
    run = next(unique(planned(options(tmp_path, "compression", only=("failing 2, rest 1",)))[1])).run
    finish(run)
    said = compress(Objective(run.config, torch.tensor([9, 8, 7])), torch.tensor([0.1, 0.5, 0.6]))
    (run.folder / job_queue.LOG).write_text(f"Compression from epoch 101: {said}.\n")
    row = row_of(run)
    assert row is not None
    assert (row["failing_classes"], row["other_classes"]) == (1, 2)


def test_a_finished_run_without_groups_shows_none(tmp_path: Path) -> None:
    given = options(tmp_path, "compression", only=("off",), seeds=1)
    for entry in unique(planned(given)[1]):
        finish(entry.run)
    assert "not run" not in shown(given)[0]


def test_markdown_has_as_many_cells_in_every_line(tmp_path: Path) -> None:
    for name in TABLES:
        table, entries = planned(options(tmp_path, name, seeds=1))
        text = render.as_markdown(fill(table, entries, {}, Setting(), 1))
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {2 + 2 * len(table.columns)}


def test_cluster_indices_of_a_case_worked_by_hand() -> None:
    # Two classes of two points at distance 2 around centres 10 apart: between 4 · 25, within 4 · 1, over 2 degrees.
    features = np.array([[-1.0, 0], [1, 0], [9, 0], [11, 0]])
    found = clusters.indices(features, np.array([0, 0, 1, 1]))
    assert found["calinski_harabasz"] == pytest.approx(100 / 1 / (4 / 2))
    assert found["davies_bouldin"] == pytest.approx((1 + 1) / 10)


# The queue.


def job(folder: Path, code: str) -> Job:
    return Job(folder.name, [sys.executable, "-c", code], folder, epochs=0)


def test_every_device_takes_so_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_queue.find_slots(["0", "3"], 2) == [{"CUDA_VISIBLE_DEVICES": d} for d in ("0", "3", "0", "3")]
    assert job_queue.find_slots(["0", "1", "2", "3", "4"], 1, 2) == [
        {"CUDA_VISIBLE_DEVICES": d} for d in ("0,1", "2,3")
    ]
    with pytest.raises(UserError, match="there is 1 GPU here"):
        job_queue.find_slots(["0"], 1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert job_queue.find_slots(None, 1) == [{}]
    with pytest.raises(UserError, match="--gpus-per-run 4: there are no GPUs here"):  # the CPU would be one device
        job_queue.find_slots(None, 1, 4)
    assert len(job_queue.find_slots(None, 2)) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert job_queue.find_slots(None, 1) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]


def test_jobs_run_each_on_its_device_and_a_failure_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "import os, pathlib; pathlib.Path({!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job(tmp_path / f"{n}", note.format(str(tmp_path / f"{n}.txt"))) for n in range(3)]
    jobs.insert(1, job(tmp_path / "bad", "import sys; sys.exit('out of luck')"))
    failures = job_queue.run_all(jobs, job_queue.find_slots(["5", "7"], 1))
    assert {(tmp_path / f"{n}.txt").read_text() for n in range(3)} <= {"5", "7"}
    assert [(f.job.label, "out of luck" in f.why) for f in failures] == [("bad", True)]
    assert "output.log" in failures[0].why
    assert capsys.readouterr().out.count("done in") == 3
    starts = json.loads((tmp_path / "0" / "provenance.json").read_text())["starts"]
    assert starts[0]["commit"]
    assert starts[0]["torch"] == torch.__version__


def test_a_signal_lets_the_jobs_save_themselves(tmp_path: Path) -> None:
    saves = (
        "import pathlib, signal, sys, time; folder = pathlib.Path({!r})\n"
        "def save(*_): (folder / 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save); (folder / 'ready').touch(); time.sleep(600)"
    )
    folder = tmp_path / "run"

    def stop_when_ready() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    with pytest.raises(job_queue.Stopped, match="SIGINT"):
        job_queue.run_all([job(folder, saves.format(str(folder)))] * 2, [{}])
    assert (folder / "saved").exists()


def test_two_calls_do_not_train_one_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    meanwhile: list[job_queue.Failure] = []
    wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"
    asked = tmp_path / "asked"
    code = f"import pathlib; pathlib.Path({str(folder / 'ready')!r}).touch()\n{wait.format(str(asked))}"

    def in_between(*_: Any) -> None:
        """Asks a second queue for the same folder when the first one's second job has ended."""
        if not asked.exists():
            meanwhile.extend(job_queue.run_all([job(folder, "")], [{}]))
            asked.touch()

    monkeypatch.setattr(job_queue._logger, "info", in_between)
    other = job(tmp_path / "other", wait.format(str(folder / "ready")))
    assert job_queue.run_all([job(folder, code), other], [{}, {}]) == []
    assert "another process is at it" in meanwhile[0].why


def test_a_run_that_outlives_its_queue_keeps_its_folder(tmp_path: Path) -> None:
    """A queue that is killed can't stop its runs: no second one is to start beside them."""
    folder = tmp_path / "run"
    queue = (
        "import sys; from pathlib import Path\n"
        "from rcl_fast.train.experiments.job_queue import Job, run_all\n"
        "code = 'import pathlib, time; pathlib.Path(sys.argv[1], \"ready\").touch(); time.sleep(600)'\n"
        "command = [sys.executable, '-c', 'import sys; ' + code, sys.argv[1]]\n"
        "run_all([Job('run', command, Path(sys.argv[1]), 0)], [{}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", queue, str(folder)])
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    (child,) = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and str(folder) in command_line(pid)]
    try:
        (failure,) = job_queue.run_all([job(folder, "")], [{}])
        assert "another process is at it" in failure.why
    finally:
        os.kill(child, signal.SIGKILL)


def command_line(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_folder_that_cannot_be_had_is_said_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = fcntl.flock

    def without_locks(file: Any, operation: int) -> None:
        if "bad" in file.name:
            raise OSError(errno.ENOLCK, "No locks available")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", without_locks)
    (tmp_path / "file").touch()
    jobs = [job(tmp_path / "bad", ""), job(tmp_path / "file" / "below", ""), job(tmp_path / "good", "")]
    failures = job_queue.run_all(jobs, [{}])
    assert ["No locks available" in failures[0].why, "Not a directory" in failures[1].why] == [True, True]
    assert str(tmp_path / "bad") in failures[0].why
    assert capsys.readouterr().out.count("done in") == 1


# One real run, of which two tables and a picture are made.


@pytest.mark.slow
def test_a_real_run_gives_a_picture_and_the_next_table_trains_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = options(tmp_path, "figure3", dataset="digits_lt", epochs=1, seeds=1, only=("BCL+RCL",), data=None)
    assert "1 run: 0 done, 0 half done, 1 to start" in call(given)
    name = "figure3-digits_lt-1epochs-only"
    written = {path.name for path in (given.options.folder / "tables").iterdir()}
    assert written == {f"{name}.{end}" for end in ("md", "json", "jsonl", "points.json", "svg", "png")}
    points = json.loads((given.options.folder / "tables" / f"{name}.points.json").read_text())
    assert len(points["panels"]["BCL+RCL"]["x"]) == 400

    (checkpoint,) = given.options.folder.glob("*/last.pt")
    weights = checkpoint.read_bytes()
    checkpoint.unlink()
    assert f"{name}.svg" in call(given)  # drawn again from its points
    checkpoint.write_bytes(weights)
    assert "1 run: 1 done, 0 half done, 0 to start" in call(dataclasses.replace(given, table="table5"))
    (row,) = map(
        json.loads, (given.options.folder / "tables" / "table5-digits_lt-1epochs-only.jsonl").read_text().splitlines()
    )
    for features in ("backbone", "head"):
        assert row[f"{features}_calinski_harabasz"] > 0
        assert row[f"last_epoch_{features}_davies_bouldin"] > 0
    assert row["date"]
    assert row["commit"] != "unknown"
