import dataclasses

import numpy as np
import pytest

from rcl_fast.train.data.samples import Samples
from rcl_fast.train.loaders.base import Reading, StateMismatch, identity, position, state, training_reading
from rcl_fast.train.options import ViewOptions

OPTIONS = ViewOptions(16, (0, 0, 0), (1, 1, 1), x1="crop_flip", x2="sim", x3="sim", evaluation="as_is")


class Loader:
    """A loader's outside."""

    steps_per_epoch = 3

    def __init__(self, reading: Reading, pipeline: str = "torchvision") -> None:
        self.identity = identity(reading, pipeline)

    def epoch(self, epoch: int, start: int = 0):
        yield from ()


def reading(folder: str = "/data", names: str = "abcd", labels: tuple[int, ...] = (0, 0, 1, 1), **changes) -> Reading:
    samples = Samples([f"{folder}/{name}.png" for name in names], np.array(labels))
    return training_reading(samples, ("crop_flip", "sim"), OPTIONS, **{"seed": 0, "batch_size": 2, **changes})


def test_a_position_is_found_again() -> None:
    saved = state(Loader(reading()), epoch=3, step=1)
    assert position(Loader(reading()), saved) == (3, 1)


def test_the_images_may_move_to_another_folder() -> None:
    saved = state(Loader(reading("/data")), 0, 0)
    assert position(Loader(reading("/mnt/other/place")), saved) == (0, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Loader(reading(names="abce")), r"images and labels \(was 4, sha256 .*, now 4, sha256"),
        (Loader(reading(labels=(0, 1, 1, 1))), "images and labels"),
        (Loader(reading(names="abc", labels=(0, 0, 1))), "images and labels"),
        (Loader(reading(batch_size=4)), r"batch size \(was 2, now 4\)"),
        (Loader(reading(world=2)), r"processes \(was 1, now 2\)"),
        (Loader(reading(seed=1)), r"seed \(was 0, now 1\)"),
        (Loader(reading(drop_last=False)), r"last partial batch \(was dropped, now kept\)"),
        (Loader(reading(), "DALI"), r"loader \(was torchvision, now DALI\)"),
        (Loader(dataclasses.replace(reading(), kinds=("sim", "sim"))), r"views \(was crop_flip, sim of"),
    ],
)
def test_a_position_in_other_batches_is_refused(other: Loader, message: str) -> None:
    with pytest.raises(StateMismatch, match=message):
        position(other, state(Loader(reading()), 0, 1))


def test_pixels_in_memory_count_too() -> None:
    def of(images: np.ndarray) -> Loader:
        return Loader(training_reading(Samples(images, np.zeros(4, int)), ("sim",), OPTIONS, seed=0, batch_size=2))

    images = np.zeros((4, 16, 16, 3), np.uint8)
    changed = images.copy()
    changed[3, 0, 0, 0] = 1
    assert position(of(images.copy()), state(of(images), 1, 2)) == (1, 2)
    with pytest.raises(StateMismatch, match="images and labels"):
        position(of(changed), state(of(images), 1, 2))
