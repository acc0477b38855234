"""The loaders of a run, from its configuration: which one "auto" is, and what each reads."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from rcl_fast.train.data.datasets import Splits, load_splits
from rcl_fast.train.data.manifest import Manifest, check_readable, default_file, read_manifest, without_bad
from rcl_fast.train.data.samples import BadImage, Samples
from rcl_fast.train.loaders.base import (
    Loader,
    Reading,
    balanced_reading,
    evaluation_reading,
    raise_it,
    training_reading,
)
from rcl_fast.train.loaders.device import DeviceLoader
from rcl_fast.train.loaders.synthetic import SyntheticLoader
from rcl_fast.train.loaders.torchvision import TorchvisionLoader
from rcl_fast.train.options import Config, LoaderName, training_kinds
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.machine import Machine
from rcl_fast.train.views.params import plan

Say = Callable[[str], None]

_EVALUATED_TOGETHER = 8  # training batches, of small images on a GPU: they keep nothing, and would not fill it


def load(settings: Config, say: Say) -> Splits:
    """The data set, without the bad images that are to be skipped; raises SystemExit with what is wrong with it."""
    data = settings.data
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            splits = load_splits(
                data.dataset,
                data.data,
                imbalance=data.imbalance,
                imbalance_shape=data.imbalance_shape,
                validation_fraction=data.validation_fraction,
                validate_on=data.validate_on,
                seed=settings.run.seed,
            )
        for warning in caught:
            say(f"note: {warning.message}")
        if isinstance(splits.train.images, list):
            return _without_bad(settings, splits, say)
        return splits
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def with_loader(settings: Config, splits: Splits, machine: Machine, say: Say) -> Config:
    """The configuration with "auto" made a loader's name, so that a resumed run takes the same."""
    if settings.data.loader != "auto":
        return settings
    name, note = choose(_training_reading(settings, splits, raise_it), machine.device)
    if note is not None:
        say(f"note: {note}")
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, loader=name))


def training_loader(settings: Config, splits: Splits, machine: Machine, say: Say) -> Loader:
    """Raises SystemExit where the loader of the configuration can't bring these images or views."""
    reading = _training_reading(settings, splits, _on_bad(settings, say))
    if settings.data.synthetic_data:
        return SyntheticLoader(reading, machine.device)
    loader = _build(settings, reading, machine)
    compile_views(settings, loader, machine)
    return loader


def compile_views(settings: Config, loader: Loader, machine: Machine) -> None:
    """With --compile, those that are made on a GPU."""
    if settings.run.compile and machine.device.type == "cuda" and isinstance(loader, DeviceLoader):
        loader.compile()


def balanced_loader(settings: Config, splits: Splits, machine: Machine, say: Say) -> Loader:
    """The classifier's view of the training images, each class equally often; raises SystemExit as training_loader."""
    reading = balanced_reading(
        splits.train,
        training_kinds(settings.views, contrastive=False),
        settings.views,
        seed=settings.run.seed,
        batch_size=settings.optimization.batch_size,
        on_bad=_on_bad(settings, say),
    )
    return _build(settings, reading, machine)


def evaluation_loader(settings: Config, samples: Samples, machine: Machine, say: Say) -> Loader:
    """Raises SystemExit where the loader of the configuration can't bring these images."""
    batch_size = settings.optimization.batch_size
    if settings.data.loader == "device" and machine.device.type == "cuda":
        batch_size *= _EVALUATED_TOGETHER
    on_bad = _on_bad(settings, say)
    reading = evaluation_reading(
        samples,
        settings.views,
        batch_size=batch_size,
        rank=distributed.rank(),
        world=distributed.world(),
        on_bad=on_bad,
    )
    return _build(settings, reading, machine)


def _training_reading(settings: Config, splits: Splits, on_bad: Callable[[BadImage], None]) -> Reading:
    return training_reading(
        splits.train,
        training_kinds(settings.views, settings.contrastive),
        settings.views,
        seed=settings.run.seed,
        batch_size=settings.optimization.batch_size,
        rank=distributed.rank(),
        world=distributed.world(),
        on_bad=on_bad,
    )


def _build(settings: Config, reading: Reading, machine: Machine) -> Loader:
    data = settings.data
    try:
        return make_loader(data.loader, reading, device=machine.device, workers=data.workers)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"--loader {data.loader}: {error}") from error


def _without_bad(settings: Config, splits: Splits, say: Say) -> Splits:
    """By the manifest: under "error" a known bad image ends the run before it starts, if a manifest is there."""
    data = settings.data
    assert data.data is not None  # images in files lie somewhere
    names = ("train", "validation", "test")
    parts = {name: getattr(splits, name) for name in names}
    if data.on_bad_image == "error":
        if (data.manifest or default_file(data.data)).is_file():
            manifest = _manifest(settings, data.data)
            for samples in parts.values():
                check_readable(samples, manifest)
        return splits
    manifest = _manifest(settings, data.data)
    for name, samples in parts.items():
        parts[name], left_out = without_bad(samples, manifest, splits.class_names)
        if left_out:
            say(f"{name}: {len(left_out):,} bad images left out (all in {manifest.file}), first {left_out[0]}")
    return dataclasses.replace(splits, **parts)


def _manifest(settings: Config, data: Path) -> Manifest:
    return read_manifest(settings.data.dataset, data, settings.data.manifest)


def _on_bad(settings: Config, say: Say) -> Callable[[BadImage], None]:
    """What becomes of an image that the manifest thought good: it ends the run, or is named once and left out."""
    if settings.data.on_bad_image == "error":
        return raise_it
    named = set()

    def name_it(error: BadImage) -> None:
        if str(error) not in named:
            named.add(str(error))
            say(f"left out: {error}")

    return name_it


def choose(reading: Reading, device: torch.device) -> tuple[LoaderName, str | None]:
    """What "auto" is for these samples and views; a sentence where it is not the fastest there could be.

    Images in memory stay on the device. Files go through DALI for a GPU, through torchvision for a CPU, where it is the
    faster of the two (docs/data.md).
    """
    for kind in reading.kinds:
        try:
            plan(kind, reading.options)
        except ValueError as error:
            return "torchvision", f"--loader auto takes torchvision, which is slower: {error}"
    if isinstance(reading.samples.images, np.ndarray):
        return "device", None
    if device.type == "cpu":
        return "torchvision", None
    if has_dali():
        return "dali", None
    return "torchvision", (
        "--loader auto takes torchvision, which is slower, as DALI is not installed (pip install '.[dali]' in "
        "rcl_fast's folder, on Linux): the CPU alone decodes and augments, and a GPU may wait for it; each epoch's "
        "line says how long"
    )


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package that holds it
        return False


def make_loader(name: LoaderName, reading: Reading, *, device: torch.device, workers: int) -> Loader:
    """The loader of that name. `workers`: processes of torchvision, threads of DALI.

    Raises ValueError where the loader does not do these samples or views, ImportError where DALI is missing.
    """
    if name == "torchvision":
        return TorchvisionLoader(reading, workers=workers, pin_memory=device.type == "cuda")
    if name == "device":
        return DeviceLoader(reading, device)
    if name == "dali":
        from rcl_fast.train.loaders.dali import DaliLoader  # needs DALI, which is optional

        return DaliLoader(reading, device=device, threads=max(workers, 1))
    raise ValueError(f'there is no loader {name!r}: expected "dali", "torchvision" or "device"')
