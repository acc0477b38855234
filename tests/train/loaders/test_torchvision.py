import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_batches import joined, same
from PIL import Image

from rcl_fast.train.data.samples import BadImage, Samples
from rcl_fast.train.loaders import torchvision
from rcl_fast.train.loaders.base import Batch, evaluation_spec, training_spec
from rcl_fast.train.loaders.torchvision import TorchvisionLoader
from rcl_fast.train.options import ViewKind, ViewOptions

OPTIONS = ViewOptions(
    image_size=16,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    x1="randaugment",  # samples from random and numpy too
    x2="sim",
    x3="sim",
    evaluation="as_is",
)
VIEWS: tuple[ViewKind, ...] = ("randaugment", "sim", "sim")


def training_loader(
    samples: Samples,
    *,
    kinds: tuple[ViewKind, ...] = VIEWS,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> TorchvisionLoader:
    spec = training_spec(samples, kinds, OPTIONS, seed=seed, batch_size=8, rank=rank, world_size=world_size)
    return TorchvisionLoader(spec, workers=workers)


def evaluation_loader(
    samples: Samples, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TorchvisionLoader:
    spec = evaluation_spec(samples, OPTIONS, batch_size=batch_size, rank=rank, world_size=world_size)
    return TorchvisionLoader(spec, workers=workers)


def noise(n: int) -> Samples:
    """Sample k has label k % 5, and k in the first byte of its otherwise random image."""
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return Samples(images, np.arange(n) % 5)


def epochs(workers: int, seed: int = 0) -> list[list[Batch]]:
    """Epochs 0, 1 and 0 again, after an epoch that was broken off."""
    loader = training_loader(noise(22), workers=workers, seed=seed)
    next(iter(loader.epoch(7)))
    return [list(loader.epoch(epoch)) for epoch in (0, 1, 0)]


@pytest.fixture(scope="module")
def without_workers() -> list[list[Batch]]:
    return epochs(workers=0)


class TestTrainingLoader:
    def test_batches_are_what_they_say(self, without_workers: list[list[Batch]]) -> None:
        loader = training_loader(noise(22))
        assert loader.steps_per_epoch == len(without_workers[0]) == 2
        for batch in without_workers[0]:
            assert [(view.dtype, tuple(view.shape)) for view in batch.views] == [(torch.float32, (8, 3, 16, 16))] * 3
            assert [(of.dtype, tuple(of.shape)) for of in (batch.labels, batch.indices)] == [(torch.int64, (8,))] * 2
            assert torch.equal(batch.labels, batch.indices % 5)

    def test_workers_change_nothing(self, without_workers: list[list[Batch]]) -> None:
        for expected, found in zip(without_workers, epochs(workers=2), strict=True):
            assert same(expected, found)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_epoch_goes_on_from_any_step(self, without_workers: list[list[Batch]], workers: int) -> None:
        assert same(without_workers[1][1:], list(training_loader(noise(22), workers=workers).epoch(1, start=1)))

    def test_epochs_differ_and_repeat(self, without_workers: list[list[Batch]]) -> None:
        first, second, again = without_workers
        assert same(first, again)
        assert not torch.equal(first[0].indices, second[0].indices)

    def test_an_image_is_augmented_anew_in_every_epoch_view_and_seed(self, without_workers: list[list[Batch]]) -> None:
        def views_of(batches: list[Batch], sample: int) -> list[bytes]:
            return [
                view[row].numpy().tobytes()
                for batch in batches
                for row in (batch.indices == sample).nonzero().flatten()
                for view in batch.views[1:]
            ]

        runs = [without_workers[0], without_workers[1], epochs(workers=0, seed=1)[0]]
        in_all = set.intersection(*({int(i) for batch in run for i in batch.indices} for run in runs))
        sample = min(in_all)
        assert len({view for run in runs for view in views_of(run, sample)}) == 6

    def test_ranks_see_the_images_that_one_process_sees(self) -> None:
        make = partial(training_loader, noise(22))
        whole = list(make().epoch(3))
        ranks = [list(make(rank=rank, world_size=2).epoch(3)) for rank in range(2)]
        assert same(whole, joined(*ranks))

    def test_the_global_generators_are_left_alone(self) -> None:
        def states() -> tuple:
            return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002

        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        before = states()
        loader = training_loader(noise(8))
        assert len(list(loader.epoch(0))) == 1
        assert states() == before

    def test_without_a_contrastive_loss_there_is_one_view(self) -> None:
        (batch,) = training_loader(noise(8), kinds=("randaugment",)).epoch(0)
        assert len(batch.views) == 1


class TestEvaluationLoader:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_each_sample_once_over_all_ranks_with_its_own_image(self, world_size: int) -> None:
        samples = noise(23)
        loaders = [
            evaluation_loader(samples, batch_size=6, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        batches = [batch for loader in loaders for batch in loader.epoch(0)]
        assert sum(loader.steps_per_epoch for loader in loaders) == len(batches)
        index = torch.cat([batch.indices for batch in batches])
        assert index.tolist() == list(range(23))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), index % 5)
        marks = torch.cat([batch.views[0][:, 0, 0, 0] for batch in batches])
        assert torch.equal((255 * marks).round().long(), index)

    def test_epochs_are_the_same(self) -> None:
        loader = evaluation_loader(noise(5), batch_size=4)
        assert same(list(loader.epoch(0)), list(loader.epoch(1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_reaches_the_user_as_one_clear_line(tmp_path: Path, workers: int) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (16, 16)).save(good)
    bad.write_bytes(b"")
    samples = Samples([str(good), str(bad)], np.array([0, 0]), ["list.txt, line 1", "list.txt, line 2"])
    loader = evaluation_loader(samples, batch_size=2, workers=workers)
    with pytest.raises(BadImage) as error:
        list(loader.epoch(0))
    assert str(error.value) == f"cannot read the image {bad} (list.txt, line 2): the file is empty"


def threads(image: Image.Image) -> torch.Tensor:
    return torch.tensor(torch.get_num_threads())


def test_workers_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision, "evaluation_view", lambda options: threads)
    loader = evaluation_loader(noise(2), batch_size=1, workers=2)
    assert [int(batch.views[0]) for batch in loader.epoch(0)] == [1, 1]


def test_torch_has_nothing_to_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert list(evaluation_loader(noise(3), batch_size=2, workers=1).epoch(0))


AN_ERROR = """
import sys
sys.path.insert(0, {folder!r})
import test_torchvision
test_torchvision.torchvision.WORKER_GRACE_SECONDS = 100_000
batches = test_torchvision.training_loader(test_torchvision.noise(22), workers=2).epoch(0)
next(batches)
raise RuntimeError("the run is broken")
"""


def test_an_error_does_not_wait_for_the_workers() -> None:
    """They outlive a SIGTERM for a while, also the one that Python sends when it ends."""
    code = AN_ERROR.format(folder=str(Path(__file__).parent))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ended.stderr.splitlines()[-1] == "RuntimeError: the run is broken"
