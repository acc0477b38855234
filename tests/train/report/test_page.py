"""The report as a reader gets it: what stands in the page, what the figures hold, and that the file stands alone."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from rcl_fast.train.report import feature_map, style
from rcl_fast.train.report import page as report_page
from rcl_fast.train.report.calibration import confidence_histogram, reliability_diagram
from rcl_fast.train.report.classes import _rolling_mean, class_accuracies, confusion_matrix
from rcl_fast.train.report.curves import accuracy_curves, learning_rate_curve, loss_curves
from rcl_fast.train.report.page import Report, write_report

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The page's text outside scripts, its scripts by id, and each attribute that could load or lead elsewhere."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.links: list[str] = []
        self.text = ""
        self._tag = ""
        self._attributes: dict[str, str | None] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag, self._attributes = tag, dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "script":
            self.scripts.append((self._attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._tag != "style":
            self.text += data

    def script(self, name: str) -> str:
        return next(text for attributes, text in self.scripts if attributes.get("id") == name)


def _constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _figures(page: Page) -> dict[str, Any]:
    return json.loads(page.script("figures"), parse_constant=_constant)


def _write(tmp_path: Path, report: Report) -> tuple[str, Page]:
    path = tmp_path / "run" / "report.html"
    write_report(path, report)
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def _report(**changes: Any) -> Report:
    """Four classes, of which "few" is at 0 %, and three epochs with holes in the second."""
    counts = [300, 10, 150, 50]
    whole = Report(
        title="digits_lt · bcl_rcl",
        config={"seed": 3, "loss": {"temperature": 0.07, "head": {"hidden": 512}}, "data": {"root": None}},
        metrics={
            "balanced_accuracy": 0.5725,
            "harmonic_mean": 0.0,
            "per_class_accuracy": [0.9, 0.0, 0.8, 0.59],
            "many": 0.85,
            "medium": 0.59,
            "few": 0.0,
            "classes_at_zero": 1,
            "best_epoch": 2,
            "last_epoch_balanced_accuracy": 0.5611,
            "parameters": 464154,
            "images_per_second": math.inf,
            "selected_on": "a held-out tenth of the training set",
            "interrupted": False,
        },
        history=[
            {"epoch": 1, "loss": 4.0, "cross_entropy": 1.5, "contrastive": 2.5, "balanced_accuracy": 0.25},
            {"epoch": 2, "loss": math.nan, "cross_entropy": 1.0, "learning_rate": 0.2, "balanced_accuracy": 0.5},
            {"epoch": 3, "loss": 3.0, "cross_entropy": 0.5, "learning_rate": 0.1, "balanced_accuracy": 0.375},
        ],
        class_names=["ant", EVIL, "cow & calf", "7"],
        class_counts=counts,
        confusion=np.array([[9, 0, 1, 0], [5, 0, 5, 0], [0, 1, 8, 1], [1, 1, 2, 6]]),
        embeddings=None,
        embedding_labels=None,
        notes=["The other 8 get 0.005."],
    )
    return dataclasses.replace(whole, **changes)


def _features(classes: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(classes), each)
    rng = np.random.default_rng(0)
    return rng.normal(size=(classes, 16))[labels] + 0.1 * rng.normal(size=(len(labels), 16)), labels


def test_the_page_tells_the_headline_and_has_every_section(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _report())
    for text in (
        "57.2 %",
        "0 because of 1 class at 0 %",
        "85.0 %",
        "59.0 %",
        "selected on a held-out tenth of the training set",
        "56.1 %",
        "464,154",
        "The other 8 get 0.005.",
        "Training loss",
        "Learning rate",
        "Accuracy of each class",
        "Confusion",
        "Features of the test images",
        "Configuration",
        "head.hidden",
        "0.07",
    ):
        assert text in page.text
    assert "interrupted before" not in page.text
    assert "interrupted after" not in page.text


def test_the_worst_class_is_named() -> None:
    tile = report_page._worst_class(_report())
    assert (tile.value, tile.detail) == ("0.0 %", EVIL)
    metrics = {"per_class_accuracy": [0.5, None, 0.25, 0.25]}
    assert report_page._worst_class(_report(metrics=metrics)).detail == "cow & calf, and 1 other"


def test_the_file_stands_alone(tmp_path: Path) -> None:
    source, page = _write(tmp_path, _report())
    assert page.links == []
    assert "default-src 'none'" in source
    assert "@import" not in source.split("</style>")[0]


def test_plotly_is_inlined_once_and_offers_no_upload(tmp_path: Path) -> None:
    source, page = _write(tmp_path, _report())
    assert source.count("* plotly.js v") == 1
    assert sum(len(text) > 1_000_000 for _, text in page.scripts) == 1
    drawing = page.scripts[-1][1]
    assert 'modeBarButtons: [["toImage", "resetScale2d"]]' in drawing
    assert "showSendToCloud: false" in drawing


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    features, labels = _features(4, 5)
    notes, title = [f"note {EVIL}"], f"title {EVIL}"
    changed = _report(
        embeddings=features, embedding_labels=labels, notes=notes, title=title, config={EVIL: {EVIL: EVIL}}
    )
    source, page = _write(tmp_path, changed)
    assert "<script>alert" not in source
    assert len(page.scripts) == 3
    assert f"title {EVIL}" in page.text
    assert f"note {EVIL}" in page.text
    # plotly reads tags in its texts, so a name reaches it as entities.
    figures = _figures(page)
    assert "<script>" not in json.dumps(figures)
    names = [trace["hovertemplate"] for trace in figures["embeddings"]["data"]]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;<extra></extra>" in names


def test_a_name_that_is_not_unicode_is_written(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _report(class_names=["ant", "caf\udce9", "b", "c"]))
    assert "caf?" in page.text


def test_unknown_numbers_are_dashes(tmp_path: Path) -> None:
    metrics = {"balanced_accuracy": math.nan, "harmonic_mean": None, "images_per_second": math.inf, "few": -math.inf}
    _, page = _write(tmp_path, _report(metrics=metrics))
    assert [tile.value for tile in report_page._tiles(_report(metrics=metrics))] == ["–"] * 7
    assert set(report_page._facts(metrics).values()) == {"–"}
    assert set(report_page._flatten(metrics).values()) == {"–"}
    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert "classes" not in _figures(page)
    assert "No figure: the run recorded no accuracy of a class." in page.text


def test_numpy_numbers_are_numbers() -> None:
    assert style.percent(np.float32(0.5)) == "50.0 %"
    assert report_page._text(np.float32(0.25)) == "0.25"
    assert report_page._text(np.bool_(True)) == "yes"


def test_interrupted_in_the_first_epoch(tmp_path: Path) -> None:
    empty = _report(history=[], metrics={"interrupted": True}, confusion=np.zeros((4, 4), dtype=int))
    source, page = _write(tmp_path, empty)
    assert "interrupted before its first epoch was finished" in page.text
    assert page.text.count("No figure:") == 8
    assert "plotly.js" not in source  # nothing to draw


def test_interrupted_later(tmp_path: Path) -> None:
    changed = _report(metrics={**_report().metrics, "interrupted": True})
    assert "interrupted after 3 finished epochs" in _write(tmp_path, changed)[1].text


def _traces(figure: go.Figure | None) -> dict[str, Any]:
    assert figure is not None
    return {trace.name: trace for trace in figure.data}


def test_the_curves_hold_the_history() -> None:
    history = _report().history
    accuracy = accuracy_curves(history, 2.0, "the validation set")
    assert "the validation set" in accuracy.text
    traces = _traces(accuracy.figure)
    assert list(traces) == ["balanced accuracy"]
    np.testing.assert_array_equal(traces["balanced accuracy"].x, [1, 2, 3])
    np.testing.assert_array_equal(traces["balanced accuracy"].y, [25, 50, 37.5])

    losses = loss_curves(history, 2.0).figure
    traces = _traces(losses)
    np.testing.assert_array_equal(traces["total"].y, [4, math.nan, 3])
    np.testing.assert_array_equal(traces["cross-entropy"].y, [1.5, 1, 0.5])
    np.testing.assert_array_equal(traces["contrastive"].y, [2.5, math.nan, math.nan])
    assert losses.layout.shapes[0].x0 == losses.layout.shapes[0].x1 == 2
    assert losses.layout.annotations[0].text == "best epoch 2"

    rate = _traces(learning_rate_curve(history, math.nan).figure)
    np.testing.assert_array_equal(rate["learning rate"].y, [math.nan, 0.2, 0.1])


def test_the_groups_keep_their_colours() -> None:
    history = [{"epoch": 1, "many": 0.5, "medium": 0.5, "few": 0.5}]
    curves = {name: trace.line.color for name, trace in _traces(accuracy_curves(history, 1, None).figure).items()}
    panel = class_accuracies(["a", "b", "c"], [101, 100, 19], np.ones(3))
    bars = {name.split()[0]: t.marker.color for name, t in _traces(panel.figure).items() if t.type == "bar"}
    tiles = {tile.label.lower(): tile.colour for tile in report_page._tiles(_report()) if tile.colour}
    assert curves == bars == tiles
    assert len(set(curves.values())) == 3


def test_the_groups_have_the_literatures_bounds() -> None:
    many, medium, few = style.groups([101, 100, 20, 19])
    np.testing.assert_array_equal(
        [many.members, medium.members, few.members], np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    )


def test_classes_are_sorted_by_their_count() -> None:
    report = _report()
    accuracies = np.array(report.metrics["per_class_accuracy"])
    figure = class_accuracies(report.class_names, report.class_counts, accuracies).figure
    many, medium, few, images = figure.data
    np.testing.assert_allclose(many.y, [90, 80])
    np.testing.assert_array_equal(many.hovertext, ["ant", "cow &amp; calf"])
    np.testing.assert_allclose([*medium.x, *medium.y, *few.x, *few.y], [3, 59, 4, 0])
    np.testing.assert_array_equal(images.y, [300, 150, 50, 10])
    assert figure.layout.yaxis2.type == "log"
    assert figure.layout.xaxis2.ticktext == ("ant", "cow &amp; calf", "7", "&lt;script&gt;alert…")


def test_confusion_rows_are_shares_and_counts_are_kept() -> None:
    report = _report()
    figure = confusion_matrix(report.class_names, report.class_counts, report.confusion).figure
    (heatmap,) = figure.data
    order = [0, 2, 3, 1]
    np.testing.assert_array_equal(heatmap.customdata, report.confusion[np.ix_(order, order)])
    np.testing.assert_allclose(heatmap.z, 10.0 * report.confusion[np.ix_(order, order)])
    assert heatmap.x[0] == "ant (rank 1)"
    assert figure.layout.yaxis.autorange == "reversed"


def test_a_class_without_test_images_leaves_its_row_empty() -> None:
    figure = confusion_matrix(["a", "b"], [2, 1], np.array([[3, 1], [0, 0]])).figure
    np.testing.assert_array_equal(figure.data[0].z, [[75, 25], [np.nan, np.nan]])


def test_many_classes_are_aggregated(tmp_path: Path) -> None:
    classes = 1_000
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.arange(1, classes + 1))
    confusion = rng.integers(0, 3, (classes, classes))
    report = _report(
        class_names=[f"species {index}" for index in range(classes)],
        class_counts=counts.tolist(),
        confusion=confusion,
        metrics={"per_class_accuracy": rng.random(classes).tolist()},
    )
    source, page = _write(tmp_path, report)
    assert (
        "1,000 classes are sorted from most to fewest training images and added up in 100 bins of about 10" in page.text
    )
    assert len(source) < 7_000_000

    (heatmap,) = confusion_matrix(report.class_names, report.class_counts, confusion).figure.data
    assert heatmap.z.shape == (100, 100)
    order = np.argsort(-counts)
    assert heatmap.customdata[2, 7] == confusion[np.ix_(order[20:30], order[70:80])].sum()
    assert heatmap.customdata.sum() == confusion.sum()
    np.testing.assert_allclose(heatmap.z.sum(axis=1), 100, rtol=1e-5)

    figure = class_accuracies(report.class_names, report.class_counts, rng.random(classes)).figure
    assert {trace.type for trace in figure.data} == {"scatter"}
    assert figure.layout.xaxis2.ticktext is None


def test_bins_of_unequal_size_lose_nothing() -> None:
    confusion = np.random.default_rng(0).integers(1, 4, (257, 257))
    (heatmap,) = confusion_matrix([str(i) for i in range(257)], [5] * 257, confusion).figure.data
    assert heatmap.z.shape == (100, 100)
    assert heatmap.customdata.sum() == confusion.sum()
    assert len(set(heatmap.x)) == 100


def test_the_rolling_mean_skips_what_is_unknown() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(_rolling_mean(values, 3), [1, 2, 4, 4, 5, np.nan, np.nan])


def test_the_subset_is_balanced_and_always_the_same() -> None:
    labels = np.array([0] * 500 + [1] * 30 + [2] * 500)
    chosen = feature_map.balanced_subset(labels, 230)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [100, 30, 100])
    assert len(set(chosen.tolist())) == 230
    np.testing.assert_array_equal(chosen, feature_map.balanced_subset(labels, 230))
    assert len(np.unique(feature_map.balanced_subset(np.arange(5_000), 2_000))) == 2_000


@pytest.mark.parametrize("classes", [4, 30])
def test_embeddings_are_coloured_by_class(classes: int) -> None:
    features, labels = _features(classes, 6)
    names = [f"class {index}" for index in range(classes)]
    order = np.random.default_rng(1).permutation(classes)
    counts = np.empty(classes, dtype=int)
    counts[order] = np.arange(classes, 0, -1)  # class order[0] has the most images
    figure = feature_map.embedding_map(names, counts.tolist(), features, labels).figure
    if classes == 4:
        assert [trace.name for trace in figure.data] == [names[index] for index in order]
        assert all(len(trace.x) == 6 for trace in figure.data)
        assert len({(trace.marker.color, trace.marker.symbol) for trace in figure.data}) == classes
    else:
        (trace,) = figure.data
        np.testing.assert_array_equal(order[np.asarray(trace.marker.color) - 1], labels)
        assert list(trace.hovertext) == [names[label] for label in labels]
    assert all(np.isfinite(trace.x).all() and np.isfinite(trace.y).all() for trace in figure.data)


def test_tsne_keeps_classes_together_and_is_deterministic() -> None:
    features, labels = _features(3, 20)
    points = feature_map.tsne(features)
    assert points is not None
    np.testing.assert_array_equal(points, feature_map.tsne(features))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(60, np.inf))
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95


@pytest.mark.parametrize(("points", "dimensions"), [(5, 3), (5, 64), (6, 1), (7, 2)])
def test_tsne_of_tiny_inputs(points: int, dimensions: int) -> None:
    features = np.random.default_rng(0).normal(size=(points, dimensions))
    placed = feature_map.tsne(features)
    assert placed is not None
    assert placed.shape == (points, 2)
    assert np.isfinite(placed).all()


def test_embeddings_that_cannot_be_drawn_say_why() -> None:
    labels = np.zeros(8, dtype=int)
    few = feature_map.embedding_map(["a"], [1], np.eye(4), labels[:4])
    same = feature_map.embedding_map(["a"], [1], np.ones((8, 4)), labels)
    broken = feature_map.embedding_map(["a"], [1], np.full((8, 4), np.nan), labels)
    assert few.figure is same.figure is broken.figure is None
    assert "at least 5 images, and there were 4" in few.text
    assert "collapsed" in same.text
    assert "there were 0" in broken.text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"class_counts": [1, 2]}, "class_counts"),
        ({"confusion": np.zeros((4, 3), dtype=int)}, "confusion"),
        ({"metrics": {"per_class_accuracy": [1.0]}}, "per_class_accuracy"),
        ({"embeddings": np.ones((3, 2))}, "embedding_labels"),
    ],
)
def test_fields_that_disagree_are_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        write_report(tmp_path / "report.html", _report(**changes))
    assert not (tmp_path / "report.html").exists()


def test_reliability_shows_accuracy_over_confidence() -> None:
    bins = np.array([[0.0, 0.0, 0.0], [4.0, 2.0, 1.0], [6.0, 5.4, 6.0]])
    panel = reliability_diagram(bins)
    assert "ECE 16.0 %" in panel.text  # (|1 - 2| + |6 - 5.4|) / 10
    assert "overconfident, by 4.0 %" in panel.text
    bars, points, diagonal = panel.figure.data
    np.testing.assert_allclose(bars.y, [np.nan, 25, 100])
    np.testing.assert_allclose(bars.x, [100 / 6, 50, 500 / 6])
    np.testing.assert_allclose(points.x, [np.nan, 50, 90])
    np.testing.assert_array_equal(diagonal.x, diagonal.y)
    (histogram,) = confidence_histogram(bins).figure.data
    np.testing.assert_allclose(histogram.y, [0, 40, 60])


def test_the_calibration_error_is_in_the_page(tmp_path: Path) -> None:
    metrics = {**_report().metrics, "expected_calibration_error": 0.16, "geometric_mean": 0.25}
    _, page = _write(tmp_path, _report(metrics=metrics, reliability=np.array([[2.0, 1.2, 1.0]])))
    assert "Calibration error (ECE)16.0 %" in re.sub(r"\s*\n\s*", "", page.text)
    assert {"reliability", "confidence"} <= _figures(page).keys()
