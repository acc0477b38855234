"""The data sets by name, each as training, validation and test samples."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from rcl_fast.train.data.cifar import CIFARS, cifar_lt
from rcl_fast.train.data.digits import digits_lt
from rcl_fast.train.data.folder import image_folder
from rcl_fast.train.data.lists import LISTS, load_lists
from rcl_fast.train.data.long_tail import ImbalanceShape, held_out
from rcl_fast.train.data.samples import BadImage, RawDataset, Samples, open_image, subset
from rcl_fast.train.errors import NotFound, UserError

__all__ = ["DATASETS", "BadImage", "Samples", "Splits", "load_noting_warnings", "load_splits", "open_image"]

_logger = logging.getLogger(__name__)

DATASETS = ("digits_lt", *CIFARS, *LISTS, "folder")


@dataclass(frozen=True, eq=False)
class Splits:
    """What a run trains on, selects on and reports."""

    train: Samples
    validation: Samples
    test: Samples
    class_names: list[str]
    published_counts: NDArray[np.int64]
    """Training samples of each class, [num_classes], with those held out."""
    selected_on: str
    """What `validation` is, for reports."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """Returns the number of training samples of each class, [num_classes], without those held out."""
        return np.bincount(self.train.labels, minlength=self.num_classes)


def load_splits(
    name: str,
    data: Path | None = None,
    *,
    imbalance: float = 100,
    imbalance_shape: ImbalanceShape = "exponential",
    validation_fraction: float = 0.1,
    validate_on: Literal["validation", "test"] = "validation",
    seed: int = 0,
) -> Splits:
    """Returns data set `name` (one of DATASETS), read from the folder `data`.

    The imbalance is made for digits_lt and the CIFARs; the others are used as they are. Validation is the data set's
    own, or `validation_fraction` of each training class, sampled with `seed`; with validate_on="test" it is the test
    set, and nothing is held out. Raises FileNotFoundError, saying what is expected where, if data is missing, and
    ValueError if it is not as it should be.
    """
    raw = read_raw(name, data, imbalance, imbalance_shape)
    check_trainable(raw, validate_on)
    if validate_on == "test":
        return _splits(raw, raw.train, raw.test, "test (as the literature does)")
    if raw.validation is not None:
        return _splits(raw, raw.train, raw.validation, "validation (the data set's own)")
    kept, out = held_out(raw.train.labels, validation_fraction, seed)
    if len(out) == 0:
        raise UserError(
            f"{data or name}: no class has two training images to hold one out; --validate-on test holds none"
        )
    what = f"validation ({100 * validation_fraction:g} % of the training set, held out)"
    return _splits(raw, subset(raw.train, kept), subset(raw.train, out), what)


T = TypeVar("T")


def load_noting_warnings(load: Callable[[], T]) -> T:
    """Returns what `load` returns, and logs its warnings; raises NotFound or UserError where it can't read files."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as in data/decode.py, for those images read here
            loaded = load()
    except UserError:
        raise
    except FileNotFoundError as error:
        raise NotFound(str(error)) from error
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    for warning in caught:
        _logger.info(f"note: {warning.message}")
    return loaded


def read_raw(name: str, data: Path | None, imbalance: float = 100, shape: ImbalanceShape = "exponential") -> RawDataset:
    """Returns data set `name` with nothing held out. Raises as `load_splits`."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}")
    try:
        if name == "digits_lt":
            return digits_lt(imbalance, shape)
        if name in CIFARS:
            return cifar_lt(name, data, imbalance, shape)
        return load_lists(name, data) if name in LISTS else image_folder(data)
    except NotFound as error:
        others = [] if data is None else [other for other in layouts(data) if other != name]
        raise NotFound(f"{error}{''.join(_HINT.format(data=data, other=other) for other in others)}") from error


_HINT = "\n{data} is laid out as {other} is: --dataset {other}"


def check_trainable(raw: RawDataset, validate_on: Literal["validation", "test"] = "validation") -> None:
    """Raises UserError for a data set that is whole, but too small to train on."""
    if len(raw.class_names) < 2:
        raise UserError(f"there is one class, {raw.class_names[0]}: a classifier needs two")
    if validate_on == "validation" and raw.validation is None and np.bincount(raw.train.labels).max() < 2:
        raise UserError("no class has two training images to hold one out; --validate-on test holds none out")


def layouts(data: Path) -> list[str]:
    """Returns the names of the data sets that a folder looks like, by the names of the files in it."""
    marks = {
        **{name: (f"{name}.npz", cifar.torchvision.base_folder) for name, cifar in CIFARS.items()},
        **{name: (listed.files["train"],) for name, listed in LISTS.items()},
    }
    found = [name for name, files in marks.items() if any((data / file).exists() for file in files)]
    folders = all((data / part).is_dir() for part in ("train", "test"))
    return [*found, *(["folder"] if folders else [])]


def _splits(raw: RawDataset, train: Samples, validation: Samples, selected_on: str) -> Splits:
    counts = np.bincount(raw.train.labels, minlength=len(raw.class_names))
    return Splits(train, validation, raw.test, raw.class_names, counts, selected_on)
