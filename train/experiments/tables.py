"""The paper's tables, declared: columns, rows, the paper's numbers, and the options of our runs.

The numbers are the paper's, as far as this project has them (docs/reproduction.md says how). None is invented: None
stands for a number that we don't have. The layout is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Options = Mapping[str, Any]
"""Options of train/run.py by name; False stands for --no-NAME."""
Paper = float | str | None
"""A number of the paper, in the units of its table; a range is text; None: not in our sources."""


class Metric(NamedTuple):
    """How a figure in a run's row is shown."""

    title: str
    scale: float
    digits: int


METRICS = {
    "balanced_accuracy": Metric("top-1, %", 100, 1),
    "harmonic_mean": Metric("harmonic mean, %", 100, 1),
    "many": Metric("many, %", 100, 1),
    "medium": Metric("medium, %", 100, 1),
    "few": Metric("few, %", 100, 1),
    "calinski_harabasz": Metric("Calinski-Harabasz ↑", 1, 0),
    "davies_bouldin": Metric("Davies-Bouldin ↓", 1, 2),
    "failing_classes": Metric("classes under the threshold", 1, 1),
    "other_classes": Metric("classes above it", 1, 1),
}


class Column(NamedTuple):
    """A data set of the table, and the figure that is shown of the runs there."""

    options: Options
    metric: str = "balanced_accuracy"


class Row(NamedTuple):
    """A method: the options of its runs, and the paper's numbers by column."""

    label: str
    options: Options | None  # None: we have no run of it
    paper: tuple[Paper, ...] = ()  # (): the paper has no such row
    block: str = ""
    without_run: str = "not built"
    second_stage: str | None = None  # of train/second_stage.py, on the checkpoint of the run
    features: str = ""  # "backbone_" or "head_": which of a run's cluster indices are shown


class Table(NamedTuple):
    """One table."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


CIFAR10 = {"dataset": "cifar10_lt"}
CIFAR100 = {"dataset": "cifar100_lt"}
NAMES = {
    "cifar10_lt": "CIFAR-10-LT",
    "cifar100_lt": "CIFAR-100-LT",
    "imagenet_lt": "ImageNet-LT",
    "places_lt": "Places-LT",
    "inaturalist18": "iNaturalist 2018",
}
ARCHITECTURES = {"resnet50": "ResNet-50", "resnext50": "ResNeXt-50"}

LOSSES = {"LC": "logit_adjusted", "SCL": "scl", "BCL": "bcl", "SCL+RCL": "scl_rcl", "BCL+RCL": "bcl_rcl"}
"""The five losses of the paper, by its names for them."""

AS_THE_PAPER = "as the paper sets them"
EQUAL = "everything but the loss held equal: alpha 2, beta 1, tau 1.3, no compression"

AT_100 = (Column({**CIFAR10, "imbalance": 100}), Column({**CIFAR100, "imbalance": 100}))

_SELECTION = (
    "The best epoch is selected on the test set on CIFAR, as the literature does, with no training image held out; "
    "the last epoch is free of that choice."
)


def _without_compression(loss: str) -> Options:
    """Returns the option for no compression, where the loss has it; elsewhere it would split a run shared by tables."""
    return {"compression": False} if loss.endswith("_rcl") else {}


def _five(numbers: Mapping[str, tuple[Paper, ...]]) -> tuple[Row, ...]:
    """Returns rows of the five losses, first with their recipes' values, then all with equal ones."""
    paper = [Row(name, {"loss": loss}, numbers[name], AS_THE_PAPER) for name, loss in LOSSES.items()]
    equal = [
        Row(name, {"loss": loss, "alpha": 2.0, "beta": 1.0, "tau": 1.3, **_without_compression(loss)}, block=EQUAL)
        for name, loss in LOSSES.items()
    ]
    return (*paper, *equal)


TABLE1 = Table(
    "table1",
    "Table 1: top-1 accuracy at imbalance factor 100, ResNet-32",
    AT_100,
    _five(
        {
            "LC": (81.2, 44.0),
            "SCL": (83.5, 51.1),
            "BCL": (84.3, 51.9),
            "SCL+RCL": (86.0, 52.2),
            "BCL+RCL": (86.2, 52.1),
        }
    ),
    (_SELECTION,),
)

TABLE2 = Table(
    "table2",
    "Table 2: harmonic mean of the class accuracies at imbalance factor 100, ResNet-32",
    tuple(column._replace(metric="harmonic_mean") for column in AT_100),
    _five(
        {
            "LC": (80.5, 35.2),
            "SCL": (83.1, 39.2),
            "BCL": (83.7, 40.2),
            "SCL+RCL": (85.3, 42.4),
            "BCL+RCL": (85.7, 41.1),
        }
    ),
    (_SELECTION, "The runs are those of table 1. With a class at 0 % the harmonic mean is 0."),
)

_NONE = (None,) * 6

TABLE3 = Table(
    "table3",
    "Table 3: top-1 accuracy by imbalance factor, ResNet-32",
    tuple(Column({**dataset, "imbalance": factor}) for dataset in (CIFAR10, CIFAR100) for factor in (100, 50, 10)),
    (
        Row("CE", {"loss": "ce"}, _NONE),
        Row("LDAM+DRW", {"loss": "ldam_drw"}, _NONE),
        Row("LogitAdjust", {"loss": "logit_adjusted"}, _NONE),
        Row("CB+Focal", {"loss": "cb_focal"}, _NONE),
        Row("BALMS (balanced softmax)", {"loss": "balanced_softmax"}, _NONE),
        Row("Decoupled: cRT", {"loss": "ce"}, _NONE, second_stage="crt"),
        Row("Decoupled: tau-norm", {"loss": "ce"}, _NONE, second_stage="tau_norm"),
        Row("Decoupled: LWS", {"loss": "ce"}, _NONE, second_stage="lws"),
        *(Row(name, None, _NONE) for name in ("BBN", "Hybrid-SPC", "RIDE", "ACE", "DRO-LT", "TSC", "ELM")),
        Row("BCL", {"loss": "bcl"}, (84.3, 87.2, 91.1, 51.9, 56.6, 64.9)),
        Row("SCL+RCL", {"loss": "scl_rcl"}, (86.0, 88.5, 91.7, 52.2, 56.8, 65.6)),
        Row("BCL+RCL", {"loss": "bcl_rcl"}, (86.2, 88.4, 92.0, 52.1, 56.0, 65.4)),
        Row("best published elsewhere", None, (86.1, 88.2, 92.0, 53.2, 57.6, 65.7), without_run="–"),
    ),
    (
        _SELECTION,
        "Decoupled is a second stage on the CE run's checkpoint of the selected epoch: its last epoch owes to that "
        "choice, and that of tau-norm to a tau selected on the same images.",
    ),
)

TABLE4 = Table(
    "table4",
    "Table 4: top-1 accuracy on ImageNet-LT, 90 epochs",
    tuple(Column({"dataset": "imagenet_lt", "arch": arch}) for arch in ("resnet50", "resnext50")),
    (
        Row("BCL", {"loss": "bcl"}, (56.2, 57.4), AS_THE_PAPER),
        Row("BCL+RCL", {"loss": "bcl_rcl"}, (56.3, 57.5), AS_THE_PAPER),
        Row("BCL", {"loss": "bcl"}, block="everything but the loss held equal: no compression"),
        Row(
            "BCL+RCL",
            {"loss": "bcl_rcl", "compression": False},
            block="everything but the loss held equal: no compression",
        ),
        Row("best published elsewhere", None, ("57.3-58.5", "58.0-58.3"), "others", without_run="–"),
    ),
    ("The best epoch is selected on ImageNet-LT's own validation set, and tested on its test set.",),
)

_CLUSTERS = (3963, 0.97, 84, 4.1), (4092, 0.94, 106, 4.0)

TABLE5 = Table(
    "table5",
    "Table 5: cluster indices of the test images' features at imbalance factor 100, ResNet-32",
    tuple(
        Column({**dataset, "imbalance": 100}, metric)
        for dataset in (CIFAR100, CIFAR10)
        for metric in ("calinski_harabasz", "davies_bouldin")
    ),
    tuple(
        Row(name, {"loss": loss}, paper, f"{features} features", features=f"{features}_")
        for features in ("backbone", "head")
        for (name, loss), paper in zip({"BCL": "bcl", "BCL+RCL": "bcl_rcl"}.items(), _CLUSTERS, strict=True)
    ),
    (
        "Our sources do not say of which features and images the paper's indices are: its numbers stand beside both "
        "of ours, of the test images. Head features are normalised, as the loss compares them.",
        _SELECTION,
    ),
)

FIGURE3 = Table(
    "figure3",
    "Figure 3: t-SNE of the test images, before (BCL) and after (BCL+RCL)",
    (Column({**CIFAR10, "imbalance": 100}),),
    (
        Row("BCL", {"loss": "bcl"}, (84.3,)),
        Row("BCL+RCL", {"loss": "bcl_rcl"}, (86.2,)),
    ),
    (_SELECTION,),
)


def _compressions(name: str) -> tuple[Row, ...]:
    loss = LOSSES[name]
    readings: Mapping[str, Options] = {
        "off": {"compression": False},
        "section 4.3: failing 1, rest 0.005": {},
        "section 3.3.2: failing 0.005, rest 1": {"compression_under": 0.005, "compression_rest": 1.0},
        "failing 2, rest 1": {"compression_under": 2.0, "compression_rest": 1.0},
    }
    numbers: Mapping[str, tuple[Paper, ...]] = {"SCL+RCL": (86.0, 52.2), "BCL+RCL": (86.2, 52.1)}
    with_groups: tuple[Paper, ...] = tuple(value for number in numbers[name] for value in (number, "–", "–"))
    return tuple(
        Row(label, {"loss": loss, "tau": 1.3, **options}, with_groups if not options else (), name)
        for label, options in readings.items()
    )


COMPRESSION = Table(
    "compression",
    "The compression rule: factors of the classes under 20 % at half time, and of the rest",
    tuple(
        column._replace(metric=metric)
        for column in AT_100
        for metric in ("balanced_accuracy", "failing_classes", "other_classes")
    ),
    (*_compressions("SCL+RCL"), *_compressions("BCL+RCL")),
    (
        _SELECTION,
        "The groups are those of the epoch in which compression starts, by accuracy on the set that selects epochs.",
        "The paper's accuracy stands at section 4.3's reading, which made its tables.",
    ),
)

TABLES = {table.name: table for table in (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, FIGURE3, COMPRESSION)}


def heading(column: Column) -> str:
    """Returns the data set as papers write it, and on a second line the metric."""
    options = column.options
    dataset: str = options["dataset"]
    name = NAMES.get(dataset, dataset)
    if "imbalance" in options:
        name += f", IF {options['imbalance']:g}"
    if "arch" in options:
        name += f", {ARCHITECTURES.get(options['arch'], options['arch'])}"
    return f"{name}\n{METRICS[column.metric].title}"
