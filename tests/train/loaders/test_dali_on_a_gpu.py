"""DALI's views made on a GPU are those of the device loader on the CPU: the same random parameters, applied there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from test_loaders import KINDS, OPTIONS, by_index, levels_apart, mean_levels_apart, smooth, training

from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders.base import Loader, evaluation_spec, training_spec
from rcl_fast.train.loaders.build import make_loader
from rcl_fast.train.options import ViewKind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="DALI's graph for a GPU needs one"),
]
COUNT = 64


def on_the_gpu(samples: Samples, kind: ViewKind) -> Loader:
    spec = training_spec(samples, (kind,), OPTIONS, seed=0, batch_size=COUNT, drop_last=False)
    return make_loader("dali", spec, device=torch.device("cuda"), workers=2)


@pytest.fixture(scope="module")
def pixels() -> Samples:
    return Samples(smooth(COUNT, 16), np.arange(COUNT) % 5)


@pytest.fixture(scope="module")
def files(pixels: Samples, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The same images as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{number}.png") for number in range(COUNT)]
    for path, image in zip(paths, pixels.images, strict=True):
        Image.fromarray(image).save(path)
    return Samples(paths, pixels.labels)


@pytest.mark.parametrize("in_files", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("kind", ["crop_flip", *KINDS, "sim_randaugment", "digits", "digits_sim"])
def test_views_are_those_of_the_device_loader(kind: ViewKind, in_files: bool, pixels: Samples, files: Samples) -> None:
    """As near as on a CPU (test_loaders.py), against the random parameters of another epoch."""
    loader = on_the_gpu(files if in_files else pixels, kind)
    expected = by_index(training("device", pixels, kinds=(kind,), batch_size=COUNT), 0)
    apart = mean_levels_apart(by_index(loader, 0).cpu(), expected)
    assert apart < 2
    assert mean_levels_apart(by_index(loader, 1).cpu(), expected) > 10 * apart


def test_jpegs_are_decoded_as_pillow_does(tmp_path: Path) -> None:
    """By nvJPEG, whose inverse transform rounds otherwise.

    A decoder may be off by one in each component (IEEE 1180), so two differ by two; blue is Y + 1.772 Cb, and rounded:
    by 6 levels at most, and by far less than one on average.
    """
    paths = [str(tmp_path / f"{number}.jpg") for number in range(8)]
    for path, image in zip(paths, smooth(8, 64), strict=True):
        Image.fromarray(image).save(path, quality=95, subsampling=0)
    samples = Samples(paths, np.zeros(8, np.int64))
    options = dataclasses.replace(OPTIONS, image_size=64)
    loaders = [
        make_loader(name, evaluation_spec(samples, options, batch_size=8), device=torch.device(device), workers=0)
        for name, device in (("dali", "cuda"), ("torchvision", "cpu"))
    ]
    dali, pillow = (next(iter(loader.epoch(0))).views[0].cpu() for loader in loaders)
    assert mean_levels_apart(dali, pillow) < 1
    assert levels_apart(dali, pillow) <= 6
