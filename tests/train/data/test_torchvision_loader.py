import random
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rcl_fast.train.data.loader import (
    Batch,
    evaluation_batches,
    evaluation_loader,
    training_batches,
    training_loader,
)
from rcl_fast.train.data.samples import BadImage, Samples
from rcl_fast.train.data.views import ViewOptions, evaluation_view, training_views

OPTIONS = ViewOptions(
    image_size=16,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    x1="randaugment",  # draws from random and numpy too
    x2="sim",
    x3="sim",
    evaluation="as_is",
)
VIEWS = training_views(OPTIONS, contrastive=True)


def noise(n: int) -> Samples:
    """Sample k has label k % 5, and k in the first byte of its otherwise random image."""
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return Samples(images, np.arange(n) % 5)


def epochs(workers: int, seed: int = 0) -> list[list[Batch]]:
    """Epochs 0, 1 and 0 again, after an epoch that was broken off."""
    loader = training_loader(noise(22), VIEWS, batch_size=8, workers=workers, seed=seed)
    next(iter(loader.epoch(7)))
    return [list(loader.epoch(epoch)) for epoch in (0, 1, 0)]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


batch_arguments = {
    "n": st.integers(1, 300),
    "world": st.integers(1, 5),
    "local": st.integers(1, 40),
    "epoch": st.integers(0, 1_000),
    "seed": st.integers(0, 2**40),
}


class TestTrainingBatches:
    @given(**batch_arguments)
    def test_the_ranks_slices_make_up_the_batch_of_one_process(
        self, n: int, world: int, local: int, epoch: int, seed: int
    ) -> None:
        if n < world:
            return
        arguments = {"epoch": epoch, "seed": seed, "batch_size": world * local, "drop_last": True}
        whole = training_batches(n, **arguments)
        ranks = [training_batches(n, rank=rank, world=world, **arguments) for rank in range(world)]
        assert {len(rank) for rank in ranks} == {len(whole)} == {max(n // (world * local), 1)}
        for batch, *slices in zip(whole, *ranks, strict=True):
            assert np.array_equal(np.concatenate(slices), batch)
            assert max(map(len, slices)) - min(map(len, slices)) <= (0 if n >= world * local else 1)
        seen = np.concatenate(whole)
        assert len(np.unique(seen)) == len(seen) == (n - n % (world * local) if n >= world * local else n)

    @given(**batch_arguments)
    def test_the_rest_can_be_kept_and_no_rank_is_ever_without_samples(
        self, n: int, world: int, local: int, epoch: int, seed: int
    ) -> None:
        if n < world:
            return
        ranks = [
            training_batches(
                n,
                epoch=epoch,
                seed=seed,
                batch_size=world * local,
                rank=rank,
                world=world,
                drop_last=False,
            )
            for rank in range(world)
        ]
        assert len({len(rank) for rank in ranks}) == 1
        assert all(len(batch) for rank in ranks for batch in rank)
        seen = np.concatenate([batch for rank in ranks for batch in rank])
        rest = n % (world * local)
        assert len(np.unique(seen)) == len(seen) == (n - rest if rest < world else n)

    def test_the_order_is_shuffled_by_seed_and_epoch_alone(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            return np.concatenate(training_batches(100, seed=seed, epoch=epoch, batch_size=10)).tolist()

        assert order(0, 0) == order(0, 0)
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
        assert abs(np.corrcoef(order(0, 0), order(0, 1))[0, 1]) < 0.3

    def test_a_batch_that_ranks_cannot_share_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"batch_size 10 .* is not a multiple of 3"):
            training_batches(100, epoch=0, seed=0, batch_size=10, world=3)
        with pytest.raises(ValueError, match="2 training samples cannot be shared by 3 processes"):
            training_batches(2, epoch=0, seed=0, batch_size=9, world=3)


@given(n=st.integers(1, 300), world=st.integers(1, 5), local=st.integers(2, 40))
def test_every_evaluation_sample_comes_once_in_order(n: int, world: int, local: int) -> None:
    ranks = [evaluation_batches(n, batch_size=world * local, rank=rank, world=world) for rank in range(world)]
    assert np.concatenate([batch for rank in ranks for batch in rank]).tolist() == list(range(n))
    assert all(0 < len(batch) <= local for rank in ranks for batch in rank)
    if n >= world:
        assert len({len(rank) for rank in ranks}) == 1


@pytest.fixture(scope="module")
def without_workers() -> list[list[Batch]]:
    return epochs(workers=0)


class TestTrainingLoader:
    def test_batches_are_what_they_say(self, without_workers: list[list[Batch]]) -> None:
        loader = training_loader(noise(22), VIEWS, batch_size=8, workers=0, seed=0)
        assert loader.steps_per_epoch == len(without_workers[0]) == 2
        for batch in without_workers[0]:
            assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
                "x1": (torch.float32, (8, 3, 16, 16)),
                "x2": (torch.float32, (8, 3, 16, 16)),
                "x3": (torch.float32, (8, 3, 16, 16)),
                "label": (torch.int64, (8,)),
                "index": (torch.int64, (8,)),
            }
            assert torch.equal(batch["label"], batch["index"] % 5)

    def test_workers_change_nothing(self, without_workers: list[list[Batch]]) -> None:
        for expected, found in zip(without_workers, epochs(workers=2), strict=True):
            assert same(expected, found)

    def test_epochs_differ_and_repeat(self, without_workers: list[list[Batch]]) -> None:
        first, second, again = without_workers
        assert same(first, again)
        assert not torch.equal(first[0]["index"], second[0]["index"])

    def test_an_image_is_augmented_anew_in_every_epoch_view_and_seed(self, without_workers: list[list[Batch]]) -> None:
        def views_of(batches: list[Batch], sample: int) -> list[bytes]:
            return [
                batch[view][row].numpy().tobytes()
                for batch in batches
                for row in (batch["index"] == sample).nonzero().flatten()
                for view in ("x2", "x3")
            ]

        runs = [without_workers[0], without_workers[1], epochs(workers=0, seed=1)[0]]
        in_all = set.intersection(*({int(i) for batch in run for i in batch["index"]} for run in runs))
        sample = min(in_all)
        assert len({view for run in runs for view in views_of(run, sample)}) == 6

    def test_ranks_see_the_images_that_one_process_sees(self) -> None:
        make = partial(training_loader, noise(22), VIEWS, batch_size=8, workers=0, seed=0)
        whole = list(make().epoch(3))
        ranks = [list(make(rank=rank, world=2).epoch(3)) for rank in range(2)]
        joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks, strict=True)]
        assert same(whole, joined)

    def test_the_global_generators_are_left_alone(self) -> None:
        def states() -> tuple:
            return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002

        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        before = states()
        loader = training_loader(noise(8), VIEWS, batch_size=8, workers=0, seed=0)
        assert len(list(loader.epoch(0))) == 1
        assert states() == before

    def test_without_a_contrastive_loss_there_is_one_view(self) -> None:
        views = training_views(OPTIONS, contrastive=False)
        (batch,) = training_loader(noise(8), views, batch_size=8, workers=0, seed=0).epoch(0)
        assert batch.keys() == {"x1", "label", "index"}


class TestEvaluationLoader:
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_each_sample_once_over_all_ranks_with_its_own_image(self, world: int) -> None:
        samples = noise(23)
        loaders = [
            evaluation_loader(samples, evaluation_view(OPTIONS), batch_size=6, workers=0, rank=rank, world=world)
            for rank in range(world)
        ]
        batches = [batch for loader in loaders for batch in loader.epoch(0)]
        assert sum(loader.steps_per_epoch for loader in loaders) == len(batches)
        index = torch.cat([batch["index"] for batch in batches])
        assert index.tolist() == list(range(23))
        assert torch.equal(torch.cat([batch["label"] for batch in batches]), index % 5)
        marks = torch.cat([batch["x1"][:, 0, 0, 0] for batch in batches])
        assert torch.equal((255 * marks).round().long(), index)

    def test_epochs_are_the_same(self) -> None:
        loader = evaluation_loader(noise(5), evaluation_view(OPTIONS), batch_size=4, workers=0)
        assert same(list(loader.epoch(0)), list(loader.epoch(1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_reaches_the_user_as_one_clear_line(tmp_path: Path, workers: int) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (16, 16)).save(good)
    bad.write_bytes(b"")
    samples = Samples([str(good), str(bad)], np.array([0, 0]), ["list.txt, line 1", "list.txt, line 2"])
    loader = evaluation_loader(samples, evaluation_view(OPTIONS), batch_size=2, workers=workers)
    with pytest.raises(BadImage) as error:
        list(loader.epoch(0))
    assert str(error.value) == f"cannot read the image {bad} (list.txt, line 2): the file is empty"


def threads(image: Image.Image) -> torch.Tensor:
    return torch.tensor(torch.get_num_threads())


def test_workers_have_one_thread_each() -> None:
    loader = evaluation_loader(noise(2), threads, batch_size=1, workers=2)
    assert [int(batch["x1"]) for batch in loader.epoch(0)] == [1, 1]


def test_torch_has_nothing_to_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert list(evaluation_loader(noise(3), evaluation_view(OPTIONS), batch_size=2, workers=1).epoch(0))
