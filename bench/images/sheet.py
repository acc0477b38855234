"""A sheet of pictures: the same images as each loader makes views of them, side by side, to look at.

    python -m bench.images.sheet --data DIR --output sheet.png    images below DIR, ImageNet-LT's recipe
    python -m bench.images.sheet --dataset cifar100_lt --data DIR --output sheet.png

DALI and the device loader share their random parameters, so their columns should be twins; torchvision samples its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

from rcl_fast.train.config import recipe
from rcl_fast.train.data.datasets import load_splits
from rcl_fast.train.data.image_files import find_image_files
from rcl_fast.train.data.samples import Samples, open_image, subset
from rcl_fast.train.loaders.base import Batch, LoaderSpec, training_spec
from rcl_fast.train.loaders.build import make_loader
from rcl_fast.train.options import ViewOptions, training_kinds


@dataclass
class Options:
    """What to draw."""

    data: Path
    """Folder of the images."""
    output: Path = Path("sheet.png")
    """Picture to write; its ending says the format."""
    dataset: Literal["imagenet_lt", "cifar10_lt", "cifar100_lt"] = "imagenet_lt"
    """Recipe; imagenet_lt takes all images below any folder."""
    images: int = 6
    """Rows of the sheet."""
    seed: int = 0
    """Seed of the choice of images and of their views."""


def main(options: Options) -> None:
    views = recipe(options.dataset, "bcl_rcl").views
    everything = samples(options)
    chosen = np.random.default_rng(options.seed).choice(len(everything), options.images, replace=False)
    picked = subset(everything, chosen)
    spec = training_spec(
        picked, training_kinds(views, contrastive=True), views, seed=options.seed, batch_size=options.images
    )
    draw(picked, made(spec), views).savefig(options.output, dpi=150)
    print(options.output)


def samples(options: Options) -> Samples:
    if options.dataset != "imagenet_lt":
        return load_splits(options.dataset, options.data).train
    files = list(find_image_files(options.data).images)
    if len(files) < options.images:
        raise SystemExit(f"{options.data} has {len(files)} images below it, and --images asks for {options.images}")
    return Samples(files, np.zeros(len(files), np.int64))


def made(spec: LoaderSpec) -> dict[str, Batch]:
    """Returns one batch of each loader that brings these images, by the loader's name."""
    names = ["torchvision", "dali", *(["device"] if isinstance(spec.samples.images, np.ndarray) else [])]
    cpu = torch.device("cpu")
    return {name: next(iter(make_loader(name, spec, device=cpu, workers=0).epoch(0))) for name in names}


def draw(picked: Samples, batches: dict[str, Batch], views: ViewOptions) -> plt.Figure:
    columns = [(loader, view) for loader in batches for view in range(3)]
    size = (1.2 * (1 + len(columns)), 1.25 * len(picked))
    figure, axes = plt.subplots(len(picked), 1 + len(columns), figsize=size, layout="constrained", squeeze=False)
    for row in range(len(picked)):
        axes[row, 0].imshow(open_image(picked, row))
        for axis, (loader, view) in zip(axes[row, 1:], columns, strict=True):
            batch = batches[loader]
            place = int((batch.indices == row).nonzero())
            axis.imshow(shown(batch.views[view][place], views))
    for axis, title in zip(axes[0], ["image", *(f"{loader}\nx{view + 1}" for loader, view in columns)], strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def shown(image: Tensor, views: ViewOptions) -> np.ndarray:
    """Returns a normalised image [3, S, S] as [S, S, 3] in 0 to 1."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (views.mean, views.std))
    return (image.cpu().float() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
