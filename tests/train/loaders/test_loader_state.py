import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import pytest

from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders.base import (
    LoaderSpec,
    StateMismatch,
    fingerprint,
    loader_state,
    read_loader_state,
    training_spec,
)
from rcl_fast.train.options import ViewOptions

OPTIONS = ViewOptions(16, (0, 0, 0), (1, 1, 1), x1="crop_flip", x2="sim", x3="sim", evaluation="as_is")


class Loader:
    """A loader's outside."""

    steps_per_epoch = 3

    def __init__(self, spec: LoaderSpec, pipeline: str = "torchvision") -> None:
        self.fingerprint = fingerprint(spec, pipeline)

    def epoch(self, epoch: int, start: int = 0):
        yield from ()


def spec(
    folder: str = "/data", names: Sequence[str] = "abcd", labels: tuple[int, ...] = (0, 0, 1, 1), **changes
) -> LoaderSpec:
    samples = Samples([f"{folder}/{name}.png" for name in names], np.array(labels))
    return training_spec(samples, ("crop_flip", "sim"), OPTIONS, **{"seed": 0, "batch_size": 2, **changes})


def test_a_position_is_found_again() -> None:
    saved = loader_state(Loader(spec()), epoch=3, step=1)
    assert read_loader_state(Loader(spec()), saved) == (3, 1)


def test_the_images_may_move_to_another_folder() -> None:
    saved = loader_state(Loader(spec("/data")), 0, 0)
    assert read_loader_state(Loader(spec("/mnt/other/place")), saved) == (0, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Loader(spec(names="abce")), r"images and labels \(was 4, sha256 .*, now 4, sha256"),
        (Loader(spec(labels=(0, 1, 1, 1))), "images and labels"),
        (Loader(spec(names="abc", labels=(0, 0, 1))), "images and labels"),
        (Loader(spec(batch_size=4)), r"batch size \(was 2, now 4\)"),
        (Loader(spec(world_size=2)), r"processes \(was 1, now 2\)"),
        (Loader(spec(seed=1)), r"seed \(was 0, now 1\)"),
        (Loader(spec(drop_last=False)), r"last partial batch \(was dropped, now kept\)"),
        (Loader(spec(), "DALI"), r"loader \(was torchvision, now DALI\)"),
        (Loader(dataclasses.replace(spec(), kinds=("sim", "sim"))), r"views \(was crop_flip, sim of"),
    ],
)
def test_a_position_in_other_batches_is_refused(other: Loader, message: str) -> None:
    with pytest.raises(StateMismatch, match=message):
        read_loader_state(other, loader_state(Loader(spec()), 0, 1))


def test_names_that_are_no_utf_8_have_a_hash_too() -> None:
    one, other = (spec(names=[os.fsdecode(name), "b", "c", "d"]) for name in (b"\xff", b"\xfe"))
    assert read_loader_state(Loader(one), loader_state(Loader(one), 0, 0)) == (0, 0)
    with pytest.raises(StateMismatch, match="images and labels"):
        read_loader_state(Loader(other), loader_state(Loader(one), 0, 0))


def test_pixels_in_memory_count_too() -> None:
    def of(images: np.ndarray) -> Loader:
        return Loader(training_spec(Samples(images, np.zeros(4, int)), ("sim",), OPTIONS, seed=0, batch_size=2))

    images = np.zeros((4, 16, 16, 3), np.uint8)
    changed = images.copy()
    changed[3, 0, 0, 0] = 1
    assert read_loader_state(of(images.copy()), loader_state(of(images), 1, 2)) == (1, 2)
    with pytest.raises(StateMismatch, match="images and labels"):
        read_loader_state(of(changed), loader_state(of(images), 1, 2))
