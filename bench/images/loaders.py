"""How fast images come: each loader on the same images and recipe, and the trainer with them against mere noise.

    python -m bench.images.loaders --cifar DIR --jpegs DIR           loaders, on the CPU and on the GPU, if there is one
    python -m bench.images.loaders --cifar DIR --jpegs DIR --train   the trainer: real data against --synthetic-data

DIR: the folder of cifar100_lt (see train/run.py), and any folder of JPEG files below class folders. Without a DIR,
images of the same sizes are made up. DALI and kornia take part where they are installed.

A round runs every variant once, over a whole epoch from the first request to the last batch, so that nothing is
prepared before the clock starts; figures are medians of the rounds, in source images a second, each of which gives
three views.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.rows import append, spread
from rcl_fast.train.config import parse, recipe
from rcl_fast.train.data.datasets import Splits, load_splits
from rcl_fast.train.data.samples import Samples, subset
from rcl_fast.train.loaders.base import Loader, LoaderSpec, training_spec
from rcl_fast.train.loaders.build import has_dali, make_loader
from rcl_fast.train.loaders.synthetic import SyntheticLoader
from rcl_fast.train.loop import engine
from rcl_fast.train.loop.step import Step
from rcl_fast.train.loop.training import Training, start_training
from rcl_fast.train.options import Config, LoaderName, training_kinds
from rcl_fast.train.runtime.hardware import choose_runtime

CPU = torch.device("cpu")


@dataclass
class Options:
    """What to measure."""

    cifar: Path | None = None
    """Folder of cifar100_lt; without one, noise of 32×32 pixels."""
    jpegs: Path | None = None
    """Folder of JPEG files below class folders; without one, made-up pictures of 500×375 pixels."""
    train: bool = False
    """Measure the trainer instead of the loaders alone."""
    rounds: int = 5
    """Rounds; the first one warms up and is not counted."""
    workers: int = 2
    """Processes of torchvision, threads of DALI and of PyTorch."""
    arch: str = "resnext50"
    """The network that --train puts on JPEGs; CIFAR's is ResNet-32."""
    output: Path | None = None
    """File of JSON lines to append the rows to."""
    dry_run: bool = False
    """Few images and rounds: proves the script."""


class Case(NamedTuple):
    """Images, and the recipe that says what becomes of them."""

    name: str
    recipe: Config
    samples: Samples
    batch_size: int


def main(options: Options) -> None:
    torch.set_num_threads(options.workers)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options, Path(folder)):
            rows = (trainer_rows if options.train else loader_rows)(case, options)
            console.print(table(case, rows))
            common = {"case": case.name, "part": "trainer" if options.train else "loaders"}
            append(options.output, [{**common, **row} for row in rows], options.dry_run)


def cases(options: Options, folder: Path) -> Iterator[Case]:
    on_gpu = torch.cuda.is_available()
    sizes = (64, 32, 64, 32) if options.dry_run else (16_384, 256, 4_096, 256) if on_gpu else (2_048, 256, 384, 32)
    cifar_images, cifar_batch, jpegs, jpeg_batch = sizes
    if options.train and not on_gpu:  # a CPU trains some forty CIFAR images a second
        cifar_images, cifar_batch, jpegs, jpeg_batch = (64, 32, 8, 4) if options.dry_run else (512, 64, 16, 8)
    small, large = recipe("cifar100_lt", "bcl_rcl"), recipe("imagenet_lt", "bcl_rcl")
    if options.cifar is not None:
        train = load_splits("cifar100_lt", options.cifar, validate_on="test").train
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (10_847, 32, 32, 3), np.uint8)
        train = Samples(pixels, np.arange(len(pixels)) % 100)
    yield Case("CIFAR, 32 px", small, repeated(train, cifar_images), cifar_batch)
    files = sorted(map(str, options.jpegs.glob("*/*"))) if options.jpegs is not None else made_up(folder)
    if not files:
        raise SystemExit(f"--jpegs {options.jpegs}: no files below class folders there")
    yield Case("JPEGs, 224 px", large, repeated(Samples(files, np.arange(len(files))), jpegs), jpeg_batch)


def repeated(samples: Samples, count: int) -> Samples:
    """Returns `count` samples in random order, repeated where they are fewer: published sets are sorted by class."""
    order = np.random.default_rng(0).permutation(len(samples))
    taken = subset(samples, order[np.arange(count) % len(samples)])
    _, labels = np.unique(taken.labels, return_inverse=True)  # few of them may lack a class
    return replace(taken, labels=labels)


def made_up(folder: Path, count: int = 32) -> list[str]:
    """Writes JPEGs of soft noise, as large and about as hard to decode as ImageNet's; returns their paths."""
    make = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(make.integers(0, 256, (47, 63, 3), np.uint8))
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)
    return sorted(map(str, folder.glob("*.jpg")))


def spec(case: Case) -> LoaderSpec:
    views = case.recipe.views
    return training_spec(
        case.samples, training_kinds(views, contrastive=True), views, seed=0, batch_size=case.batch_size
    )


def loaders(case: Case, options: Options) -> dict[str, Loader]:
    """Returns every loader that brings these images, by name, on every device there is."""
    what = spec(case)
    devices = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    found = {"torchvision, CPU": make_loader("torchvision", what, device=CPU, workers=options.workers)}
    for device in devices:
        where = "CPU" if device == CPU else "GPU"
        if has_dali():
            found[f"DALI, {where}"] = make_loader("dali", what, device=device, workers=options.workers)
        if isinstance(case.samples.images, np.ndarray):
            found[f"device, {where}"] = make_loader("device", what, device=device, workers=0)
    return found


def loader_rows(case: Case, options: Options) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[int], int]] = {
        name: partial(drain, loader) for name, loader in loaders(case, options).items()
    }
    if isinstance(case.samples.images, np.ndarray) and find_spec("kornia") is not None:
        from bench.images.kornia import epoch  # kornia is optional

        for device in (CPU, torch.device("cuda")) if torch.cuda.is_available() else (CPU,):
            runs[f"kornia, {'CPU' if device == CPU else 'GPU'}"] = partial(epoch, spec(case), device)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(3 if options.dry_run else options.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            images = run(number)
            rates[name].append(images / (time.perf_counter() - began))
    return [
        {"variant": name, **spread("images_per_second", values[1:]), "rounds": len(values) - 1}
        for name, values in rates.items()
    ]


def drain(loader: Loader, epoch: int) -> int:
    """Reads a whole epoch; returns how many images it had."""
    images = sum(len(batch.labels) for batch in loader.epoch(epoch))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images


def trainer_rows(case: Case, options: Options) -> list[dict[str, Any]]:
    """Trains the same network on each loader's images and on noise; returns a row for each of these sources."""
    arch = "resnet32" if case.name.startswith("CIFAR") else options.arch
    config = parse(["--dataset", case.recipe.data.dataset, "--arch", arch, "--batch-size", str(case.batch_size)])
    on = choose_runtime(config.run)
    counts = np.bincount(case.samples.labels)
    names = [str(number) for number in range(len(counts))]
    splits = Splits(case.samples, case.samples, case.samples, names, counts, "nothing")
    training = start_training(config, splits, on)
    what = spec(case)
    names: list[LoaderName] = ["device"] if isinstance(case.samples.images, np.ndarray) else ["dali"] * has_dali()
    sources: dict[str, Loader] = {"synthetic": SyntheticLoader(what, on.device)}
    for name in (*names, "torchvision"):
        sources[f"{name} loader"] = make_loader(name, what, device=on.device, workers=options.workers)
    measured: dict[str, list[dict[str, float]]] = {source: [] for source in sources}
    for number in range(3 if options.dry_run else options.rounds + 1):
        training.epoch = number
        for source, loader in sources.items():
            measured[source].append(an_epoch(training, loader))
    return [
        {
            "variant": source,
            "arch": arch,
            "batch_size": case.batch_size,
            "precision": on.precision,
            **spread("images_per_second", [row["images_per_second"] for row in rows[1:]]),
            "waiting_for_data": statistics.median(row["waiting_for_data"] for row in rows[1:]),
            "rounds": len(rows) - 1,
        }
        for source, rows in measured.items()
    ]


def an_epoch(training: Training, loader: Loader, step: Step | None = None) -> dict[str, float]:
    """Trains a whole epoch, whatever was trained before; returns its figures."""
    training.progress = None
    return engine.train_epoch(training, loader, Silent(), step=step)


class Silent:
    """A log that nobody reads."""

    def step_ended(self, *_: Any) -> None:
        pass


def table(case: Case, rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    shown = Table("", title=f"{case.name}, batches of {case.batch_size}")
    for heading in ("images a second", "p20 to p80", f"× {first['variant']}"):
        shown.add_column(heading, justify="right")
    if "waiting_for_data" in first:
        shown.add_column("in the loader", justify="right")
    for row in rows:
        shown.add_row(
            row["variant"],
            f"{row['images_per_second']:,.0f}",
            f"{row['images_per_second_p20']:,.0f} to {row['images_per_second_p80']:,.0f}",
            f"{row['images_per_second'] / first['images_per_second']:.2f}",
            *([f"{row['waiting_for_data']:.0%}"] if "waiting_for_data" in row else []),
        )
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
