"""Damaged files in the folders of runs, studies and tables: each is named, nothing is lost, and the others go on."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rcl_fast.train.errors import UserError
from rcl_fast.train.experiments import clusters, job_queue, pictures, runs, study
from rcl_fast.train.experiments import show as shown
from rcl_fast.train.experiments import sweep as searches
from rcl_fast.train.experiments.job_queue import Failure, Job
from rcl_fast.train.experiments.plan import Plan, kept_rows, missing_runs, plan, read_rows, unique, unusable
from rcl_fast.train.experiments.reproduce import reproduce
from rcl_fast.train.experiments.rows import row_of
from rcl_fast.train.experiments.runs import Run
from rcl_fast.train.experiments.setting import Setting
from rcl_fast.train.experiments.show import fill
from rcl_fast.train.experiments.tables import TABLES, Table
from rcl_fast.train.options import ReproduceOptions, SweepOptions
from rcl_fast.train.rundir import status

# Tables and their runs.


def options(folder: Path) -> ReproduceOptions:
    return ReproduceOptions(folder=folder / "runs", dataset="digits_lt", epochs=2, seeds=1, run=False)


def planned(folder: Path, name: str = "table1", *labels: str) -> tuple[Table, Plan, list[Run]]:
    """The rows of these labels, and their runs, all finished."""
    how = options(folder)
    table = TABLES[name]._replace(columns=TABLES[name].columns[:1])
    table = table._replace(rows=tuple(row for row in table.rows if row.label in (labels or ("LC", "BCL"))))
    entries = plan(table, Setting(epochs=2), how)
    for entry in unique(entries):
        finish(entry.run)
    return table, entries, [entry.run for entry in unique(entries)]


def finish(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps(run.config.to_dict()))
    figures = {"balanced_accuracy": 0.8, "last_epoch_balanced_accuracy": 0.8, "last_epoch": 2, "interrupted": False}
    (run.folder / "metrics.json").write_text(json.dumps({**figures, "selected_on": "test"}))
    status.write(run.folder, "finished")


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"balanced_accuracy": [1]}'])
@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_a_run_with_a_damaged_file_is_named_and_the_others_are_shown(tmp_path: Path, name: str, content: str) -> None:
    table, entries, (first, *others) = planned(tmp_path)
    (first.folder / name).write_text(content)
    (failure,) = unusable(entries, {})
    assert failure.job.label == first.label
    assert str(first.folder / name) in failure.why
    assert "the same command" in failure.why
    assert runs.state(first) == "unusable"
    assert missing_runs(entries, {}) == []
    with pytest.raises(UserError, match=name):
        runs.command(first)
    rows = {(run.id, None): row for run in others if (row := row_of(run)) is not None}
    filled = fill(table, entries, rows, Setting(epochs=2), 1)
    assert len(rows) == 3
    assert filled.without[0] == ["damaged"]
    assert filled.without[1:] == [["not run"]] * 3
    assert unusable(entries, {(first.id, None): {}}) == []  # its row is known


def test_a_run_that_was_moved_away_is_trained_again(tmp_path: Path) -> None:
    _, entries, (first, *_) = planned(tmp_path)
    (first.folder / "config.json").write_text("{")
    assert "move" in unusable(entries, {})[0].why
    shutil.rmtree(first.folder)
    assert unusable(entries, {}) == []
    assert missing_runs(entries, {}) == [first]
    assert "--output" in runs.command(first)


def test_checkpoints_without_their_configuration_are_no_run_to_go_on_with(tmp_path: Path) -> None:
    _, entries, (first, *_) = planned(tmp_path)
    (first.folder / "config.json").unlink()
    (first.folder / "last.pt").touch()
    assert "no config.json there" in unusable(entries, {})[0].why


def test_a_damaged_second_stage_is_named(tmp_path: Path) -> None:
    _, entries, (run, *_) = planned(tmp_path, "table3", "Decoupled: cRT")
    folder = run.folder / "second_stage" / "crt"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{")
    (failure,) = unusable(entries, {})
    assert f"{folder}/metrics.json is damaged" in failure.why
    assert failure.job.label.endswith(", crt")


def test_a_table_says_which_run_is_damaged_and_ends_with_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, _, (first, *_) = planned(tmp_path)
    (first.folder / "metrics.json").write_text("{")
    failures = reproduce(table, options(tmp_path))
    assert str(first.folder / "metrics.json") in failures[0].why
    assert "80.0" in capsys.readouterr().out
    assert job_queue.log_failures(failures) == 1


def test_a_checkpoint_without_features_stops_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(run: Path, _: Path | None) -> None:
        if run == first.folder:
            raise UserError("last.pt can't be read")
        (run / "clusters.json").write_text("{")

    _, entries, (first, second, *_) = planned(tmp_path)
    monkeypatch.setattr(clusters, "measure", damaged)
    failures = shown._measure_clusters(entries, {})
    assert [(failure.job.label, failure.why) for failure in failures] == [
        (first.label, "no features of its test images: last.pt can't be read")
    ]
    assert f"{second.folder}/clusters.json is damaged" in unusable(entries, {})[0].why


def test_labels_say_what_sets_runs_of_one_loss_apart(tmp_path: Path) -> None:
    _, entries, _ = planned(tmp_path)
    names = [entry.label.split(" (")[0] for entry in unique(entries)]
    assert names == [
        "cifar10_lt IF 100 logit_adjusted seed 0",
        "cifar10_lt IF 100 bcl seed 0",
        "cifar10_lt IF 100 logit_adjusted --alpha 2.0 --beta 1.0 --tau 1.3 seed 0",
        "cifar10_lt IF 100 bcl --alpha 2.0 --beta 1.0 --tau 1.3 seed 0",
    ]


ROW = {"key": "a", "second_stage": None, "seed": 0}


def test_rows_with_a_damaged_line_lose_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table1.jsonl"
    text = json.dumps(ROW) + "\n[1]\n" + json.dumps({**ROW, "key": "b"}) + '\n{"key": "c", "sec'
    file.write_text(text)
    assert set(kept_rows(file)) == {("a", None), ("b", None)}
    said = " ".join(capsys.readouterr().out.split())
    assert f"{file} is damaged in line 2, 4: kept as {file}.damaged" in said
    assert Path(f"{file}.damaged").read_text() == text
    assert not file.exists()
    assert kept_rows(file) == {}


@pytest.mark.parametrize(("line", "said"), [('{"key"', "line 2, is damaged"), ("{}", "line 2 has no key")])
def test_given_rows_with_a_damaged_line_are_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + line)
    with pytest.raises(UserError, match=rf"--rows .*rows\.jsonl: no file of rows .*{said}.*mend that line"):
        read_rows([tmp_path / "rows.jsonl"])


@pytest.mark.parametrize("content", ["{", "[]", '{"panels": {"BCL": {"x": []}}}', '{"panels": [1]}'])
def test_a_damaged_picture_is_computed_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "figure3.points.json").write_text(content)
    assert pictures.read_points(tmp_path / "figure3") == {}


# The queue.


def started(folder: Path, code: str = "print('said')") -> list[Failure]:
    return job_queue.run_all([Job("run", [sys.executable, "-c", code], folder, epochs=0)], [{}])


@pytest.mark.parametrize("content", ["", '{"starts": [', "[1]", '{"starts": [1]}', '{"starts": 3}'])
def test_a_damaged_record_of_starts_is_kept(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "provenance.json").write_text(content)
    assert started(tmp_path) == []
    assert (tmp_path / "provenance.json.damaged").read_text() == content
    assert "provenance.json is damaged" in " ".join(capsys.readouterr().out.split())
    assert started(tmp_path) == []
    assert len(job_queue.read_starts(tmp_path / "provenance.json")) == 2


def test_a_row_says_where_its_record_is_damaged(tmp_path: Path) -> None:
    _, _, (run, *_) = planned(tmp_path)
    (run.folder / "provenance.json").write_text("{")
    row = row_of(run)
    assert row is not None
    assert row["balanced_accuracy"] == 0.8
    assert "provenance.json is damaged" in row["commit"]


@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"whole\n", b"whole\n"), (b"torn \xff", b"torn \xff\n")])
def test_a_line_that_a_killed_run_left_open_is_no_part_of_the_next(tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "output.log").write_bytes(before)
    (failure,) = started(tmp_path, "import sys; print('said'); sys.exit(3)")
    assert (tmp_path / "output.log").read_bytes() == after + b"said\n"
    assert failure.why.startswith("exit status 3: said")


def test_a_job_that_is_known_to_fail_comes_as_its_failure(tmp_path: Path) -> None:
    known = Failure(Job("damaged", [], tmp_path, epochs=0), "why")
    other = Job("other", [sys.executable, "-c", ""], tmp_path / "other", epochs=0)
    assert job_queue.run_all([known, other], [{}]) == [known]
    assert (tmp_path / "other" / "provenance.json").is_file()


# Studies.


@pytest.fixture
def search(tmp_path: Path) -> searches.Search:
    """Of three trials, all finished."""
    found = searches._plan(SweepOptions("digits_lt", tmp_path / "study", ("tau=1.0,1.3,1.6",)), ())
    study.open_study(found.options.study, found.content())
    for number, tau in enumerate(("1.0", "1.3", "1.6")):
        trial = study.make_trial(found.options.study, number, {"tau": tau})
        assert trial is not None
        rows = [{"balanced_accuracy": 0.2 * number}, {"balanced_accuracy": 0.1}]
        (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figures = {"balanced_accuracy": 0.5, "best_epoch": 1, "selected_on": "validation", "interrupted": False}
        (trial.folder / "metrics.json").write_text(json.dumps(figures))
        status.write(trial.folder, "finished")
    return found


def test_a_study_without_damage(search: searches.Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert searches.show(search) == []
    assert list(searches._jobs(search)) == []
    assert "best: tau 1.6, in" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.json", "{", "--resume .* makes it anew"),
        ("metrics.json", None, "is not there: .*--resume .* makes it anew"),
        ("metrics.jsonl", '{"balanced_accuracy": 0.4}\n{"bal', "line 2, is damaged.*--resume .* makes it anew"),
        ("metrics.jsonl", None, "--resume .* makes it anew"),
        ("trial.json", "{", "move .* away, and the same command makes the trial anew"),
        ("trial.json", '{"parameters": [1]}', "it has no parameters.*move .* away"),
        ("trial.json", None, "is not there: move .* away"),
    ],
)
def test_a_trial_with_a_damaged_file_is_named_and_the_others_are_shown(
    search: searches.Search, name: str, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search.options.study / "0002" / name
    file.unlink() if content is None else file.write_text(content)
    (failure,) = searches.show(search)
    assert failure.why.startswith(str(file))
    assert re.search(said, failure.why)
    printed = " ".join(capsys.readouterr().out.split())
    assert "best: tau 1.3, in" in printed
    assert "damaged" in printed
    assert list(searches._jobs(search)) == []  # nothing is run, and nothing waited for


def test_a_trial_that_is_gone_is_run_again(search: searches.Search) -> None:
    shutil.rmtree(search.options.study / "0001")
    (job,) = searches._jobs(search)
    assert isinstance(job, Job)
    assert job.folder.name == "0001"
    assert json.loads((job.folder / "trial.json").read_text()) == {"parameters": {"tau": "1.3"}}


def test_a_trial_that_can_not_go_on_is_a_failure_and_no_end_of_the_search(search: searches.Search) -> None:
    for number in ("0000", "0001"):
        status.write(search.options.study / number, "failed")
    (search.options.study / "0000" / "config.json").write_text("{")
    found: list[Any] = list(searches._jobs(search))
    assert [isinstance(one, Failure) for one in found] == [True, False]
    assert "0000/config.json can't be read" in found[0].why


def test_damaged_trials_teach_nothing(search: searches.Search) -> None:
    tpe = pytest.importorskip("rcl_fast.train.experiments.tpe")
    (search.options.study / "0000" / "trial.json").write_text("{")
    (search.options.study / "0001" / "metrics.jsonl").write_text("{")
    assert tpe.ask(search.space, study.trials(search.options.study))["tau"] in ("1.0", "1.3", "1.6")
