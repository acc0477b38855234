"""The loaders of a run, from its configuration: which one "auto" is, and the spec of each."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rcl_fast.train.config import recipe
from rcl_fast.train.data.datasets import Splits, load_noting_warnings, load_splits
from rcl_fast.train.data.manifest import (
    Manifest,
    check_readable,
    default_file,
    read_manifest,
    unknown_indices,
    without_bad,
)
from rcl_fast.train.data.samples import BadImage, Samples, describe
from rcl_fast.train.errors import UserError
from rcl_fast.train.loaders.base import (
    Loader,
    LoaderSpec,
    balanced_spec,
    evaluation_spec,
    raise_it,
    training_spec,
)
from rcl_fast.train.loaders.device import DeviceLoader
from rcl_fast.train.loaders.synthetic import SyntheticLoader
from rcl_fast.train.loaders.torchvision import TorchvisionLoader
from rcl_fast.train.options import Config, LoaderName, training_kinds
from rcl_fast.train.runtime import distributed
from rcl_fast.train.runtime.hardware import Runtime
from rcl_fast.train.runtime.threads import processes_here, usable_cpus
from rcl_fast.train.runtime.wording import counted
from rcl_fast.train.views.params import plan_view

_logger = logging.getLogger(__name__)

# Training batches that are evaluated at once, of small images on a GPU: these keep nothing for a backward pass, and one
# batch would not fill it.
_EVALUATED_TOGETHER = 8


def load(config: Config) -> Splits:
    """Returns the data set without the bad images that are to be skipped.

    Raises:
        NotFound, BadImage, UserError: what is wrong with the data set.
    """
    data = config.data
    load_raw = partial(
        load_splits,
        data.dataset,
        data.data,
        imbalance=data.imbalance,
        imbalance_shape=data.imbalance_shape,
        validation_fraction=data.validation_fraction,
        validate_on=data.validate_on,
        seed=config.run.seed,
    )
    splits = load_noting_warnings(load_raw)
    return _without_bad(config, splits) if isinstance(splits.train.images, list) else splits


def with_loader(config: Config, splits: Splits, runtime: Runtime) -> Config:
    """Returns the configuration with a loader's name in place of "auto", so that a resumed run has the same loader."""
    if config.data.loader != "auto":
        return config
    name, note = choose(_training_spec(config, splits, raise_it), runtime.device)
    if note is not None:
        _logger.info(f"note: {note}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, loader=name))


def training_loader(config: Config, splits: Splits, runtime: Runtime) -> Loader:
    """Returns the loader of training batches; raises UserError where it can't make batches of these images or views."""
    spec = _training_spec(config, splits, _on_bad(config))
    if config.data.synthetic_data:
        return SyntheticLoader(spec, runtime.device)
    _note_workers(config)
    return _build(config, spec, runtime, compile=config.run.compile and runtime.device.type == "cuda")


def balanced_loader(config: Config, splits: Splits, runtime: Runtime) -> Loader:
    """Returns a loader of the training images, each class equally often, as view x1; raises as `training_loader`."""
    spec = balanced_spec(
        splits.train,
        training_kinds(config.views, contrastive=False),
        config.views,
        seed=config.run.seed,
        batch_size=config.optimization.batch_size,
        on_bad=_on_bad(config),
    )
    return _build(config, spec, runtime)


def evaluation_loader(config: Config, samples: Samples, runtime: Runtime) -> Loader:
    """Returns a loader of this process's share of the samples, in order; raises as `training_loader`."""
    batch_size = config.optimization.batch_size
    if config.data.loader == "device" and runtime.device.type == "cuda":
        batch_size *= _EVALUATED_TOGETHER
    spec = evaluation_spec(
        samples,
        config.views,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        on_bad=_on_bad(config),
    )
    return _build(config, spec, runtime)


def _training_spec(config: Config, splits: Splits, on_bad: Callable[[BadImage], None]) -> LoaderSpec:
    return training_spec(
        splits.train,
        training_kinds(config.views, config.contrastive),
        config.views,
        seed=config.run.seed,
        batch_size=config.optimization.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        on_bad=on_bad,
    )


def _build(config: Config, spec: LoaderSpec, runtime: Runtime, *, compile: bool = False) -> Loader:
    data = config.data
    try:
        return make_loader(data.loader, spec, device=runtime.device, workers=data.workers, compile=compile)
    except (ValueError, ImportError) as error:
        raise UserError(f"--loader {data.loader}: {error}") from error


def _note_workers(config: Config) -> None:
    """Logs where the loader's workers are more than the CPUs; PyTorch would warn of it for every loader."""
    cpus, processes = usable_cpus(), processes_here()
    workers = config.data.workers * processes
    of_recipe = recipe(config.data.dataset, config.loss.loss).data.workers  # is nobody's choice
    if config.data.loader != "device" and workers > cpus and config.data.workers != of_recipe:
        fewer = max(1, cpus // processes)
        _logger.info(f"note: {workers} workers load images on {cpus} CPUs: --workers {fewer} may be as fast")


def _without_bad(config: Config, splits: Splits) -> Splits:
    """Returns the data set without the images that the manifest knows as bad.

    With --on-bad-image error it raises BadImage for one instead, if there is a manifest.
    """
    data = config.data
    assert data.data is not None  # images in files have a folder
    parts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    if data.on_bad_image == "error":
        if data.manifest is not None or default_file(data.data).is_file():
            if splits.validation is splits.test:
                del parts["validation"]
            _check_by_manifest(parts, _manifest(config, data.data))
        return splits
    manifest = _manifest(config, data.data)
    for name, samples in parts.items():
        parts[name], left_out = without_bad(samples, manifest, splits.class_names)
        if left_out:
            what = counted(left_out, "bad image")
            _logger.info(f"{name}: {what} left out (all in {manifest.file}), first {left_out[0]}")
    good = dataclasses.replace(splits, **parts)
    return dataclasses.replace(good, published_counts=good.class_counts + _good_of_held_out(splits, good))


def _check_by_manifest(parts: dict[str, Samples], manifest: Manifest) -> None:
    """Raises BadImage for images that the manifest knows as bad; logs a note where it lacks some."""
    check_readable(parts, manifest)
    unknown = [(samples, i) for samples in parts.values() for i in unknown_indices(samples, manifest)]
    if unknown:
        _logger.info(
            f"note: {manifest.file} does not have {counted(unknown, 'image')}, such as {describe(*unknown[0])}; this "
            f"makes it anew:\n  {manifest.made_with}"
        )


def _good_of_held_out(splits: Splits, good: Splits) -> NDArray[np.int64]:
    """Returns how many images of each class are held out of the training set and not bad, [num_classes]."""
    if np.array_equal(splits.published_counts, splits.class_counts):  # validation is of its own
        return np.zeros_like(splits.class_counts)
    return np.bincount(good.validation.labels, minlength=splits.num_classes)


def _manifest(config: Config, data: Path) -> Manifest:
    return read_manifest(config.data.dataset, data, config.data.manifest)


def _on_bad(config: Config) -> Callable[[BadImage], None]:
    """Returns what is called for a bad image that the manifest does not know: it raises, or names the image once."""
    if config.data.on_bad_image == "error":
        return raise_it
    named = set()

    def name_it(error: BadImage) -> None:
        if str(error) not in named:
            named.add(str(error))
            _logger.warning(f"left out: {error}")  # each process names those in its own share

    return name_it


def choose(spec: LoaderSpec, device: torch.device) -> tuple[LoaderName, str | None]:
    """Returns the loader that "auto" stands for, and a sentence where there could be a faster one, else None.

    Images in memory stay on the device. Files go through DALI for a GPU, and through torchvision for a CPU, where it is
    the faster of the two (docs/data.md).
    """
    for kind in spec.kinds:
        try:
            plan_view(kind, spec.options)
        except ValueError as error:
            return "torchvision", f"--loader auto takes torchvision, which is slower: {error}"
    if isinstance(spec.samples.images, np.ndarray):
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
    """Returns whether DALI is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package `nvidia` is there
        return False


def make_loader(
    name: LoaderName, spec: LoaderSpec, *, device: torch.device, workers: int, compile: bool = False
) -> Loader:
    """Returns the loader of that name.

    Args:
        workers: the processes of torchvision, the threads of DALI.
        compile: whether torch.compile makes the views of the device loader.

    Raises:
        ValueError: the loader can't make batches of these samples or views.
        ImportError: DALI is missing.
    """
    if name == "torchvision":
        return TorchvisionLoader(spec, workers=workers, pin_memory=device.type == "cuda")
    if name == "device":
        return DeviceLoader(spec, device, compile=compile)
    if name == "dali":
        from rcl_fast.train.loaders.dali import DaliLoader  # needs DALI, which is optional

        return DaliLoader(spec, device=device, threads=max(workers, 1))
    raise ValueError(f'there is no loader {name!r}: expected "dali", "torchvision" or "device"')
