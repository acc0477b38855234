import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcl_fast.train.loaders.sampler import class_balanced_batches, evaluation_batches, training_batches

batch_arguments = {
    "n": st.integers(1, 300),
    "world_size": st.integers(1, 5),
    "local": st.integers(1, 40),
    "epoch": st.integers(0, 1_000),
    "seed": st.integers(0, 2**40),
}


class TestTrainingBatches:
    @given(**batch_arguments)
    def test_the_ranks_slices_make_up_the_batch_of_one_process(
        self, n: int, world_size: int, local: int, epoch: int, seed: int
    ) -> None:
        if n < world_size:
            return
        arguments = {"epoch": epoch, "seed": seed, "batch_size": world_size * local, "drop_last": True}
        whole = training_batches(n, **arguments)
        ranks = [training_batches(n, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
        assert {len(rank) for rank in ranks} == {len(whole)} == {max(n // (world_size * local), 1)}
        for batch, *slices in zip(whole, *ranks, strict=True):
            assert np.array_equal(np.concatenate(slices), batch)
            assert max(map(len, slices)) - min(map(len, slices)) <= (0 if n >= world_size * local else 1)
        seen = np.concatenate(whole)
        assert len(np.unique(seen)) == len(seen) == (n - n % (world_size * local) if n >= world_size * local else n)

    @given(**batch_arguments)
    def test_the_rest_can_be_kept_and_no_rank_is_ever_without_samples(
        self, n: int, world_size: int, local: int, epoch: int, seed: int
    ) -> None:
        if n < world_size:
            return
        ranks = [
            training_batches(
                n,
                epoch=epoch,
                seed=seed,
                batch_size=world_size * local,
                rank=rank,
                world_size=world_size,
                drop_last=False,
            )
            for rank in range(world_size)
        ]
        assert len({len(rank) for rank in ranks}) == 1
        assert all(len(batch) for rank in ranks for batch in rank)
        seen = np.concatenate([batch for rank in ranks for batch in rank])
        rest = n % (world_size * local)
        assert len(np.unique(seen)) == len(seen) == (n - rest if rest < world_size else n)

    def test_the_order_is_shuffled_by_seed_and_epoch_alone(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            return np.concatenate(training_batches(100, seed=seed, epoch=epoch, batch_size=10)).tolist()

        assert order(0, 0) == order(0, 0)
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
        assert abs(np.corrcoef(order(0, 0), order(0, 1))[0, 1]) < 0.3

    def test_a_batch_that_ranks_cannot_share_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"batch_size 10 .* is not a multiple of 3"):
            training_batches(100, epoch=0, seed=0, batch_size=10, world_size=3)
        with pytest.raises(ValueError, match="2 training samples cannot be shared by 3 processes"):
            training_batches(2, epoch=0, seed=0, batch_size=9, world_size=3)


@given(n=st.integers(1, 300), world_size=st.integers(1, 5), local=st.integers(2, 40))
def test_every_evaluation_sample_comes_once_in_order(n: int, world_size: int, local: int) -> None:
    ranks = [
        evaluation_batches(n, batch_size=world_size * local, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert np.concatenate([batch for rank in ranks for batch in rank]).tolist() == list(range(n))
    assert all(0 < len(batch) <= local for rank in ranks for batch in rank)
    if n >= world_size:
        assert len({len(rank) for rank in ranks}) == 1


class TestClassBalancedBatches:
    @given(
        counts=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
        batch_size=st.integers(1, 50),
        epoch=st.integers(0, 1_000),
        seed=st.integers(0, 2**40),
    )
    def test_classes_and_the_samples_of_each_come_equally_often(
        self, counts: list[int], batch_size: int, epoch: int, seed: int
    ) -> None:
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        n = len(labels)
        batches = class_balanced_batches(labels, epoch=epoch, seed=seed, batch_size=1)
        order = np.concatenate(batches)
        assert len(order) == n
        of_class = np.bincount(labels[order], minlength=len(counts))[np.array(counts) > 0]
        assert of_class.max() - of_class.min() <= 1
        for label in np.unique(labels):
            of_sample = np.bincount(order, minlength=n)[labels == label]
            assert of_sample.max() - of_sample.min() <= 1

        sizes = [len(batch) for batch in class_balanced_batches(labels, epoch=epoch, seed=seed, batch_size=batch_size)]
        assert sizes == ([batch_size] * (n // batch_size) or [n])

    def test_the_order_is_shuffled_by_seed_and_epoch_alone(self) -> None:
        labels = np.repeat([0, 1, 2], [90, 9, 1])

        def order(seed: int, epoch: int) -> list[int]:
            return np.concatenate(class_balanced_batches(labels, seed=seed, epoch=epoch, batch_size=10)).tolist()

        assert order(0, 0) == order(0, 0)
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
        # The largest class has too many images for one epoch: another one brings others.
        first, second = ({index for index in order(0, epoch) if index < 90} for epoch in (0, 1))
        assert len(first) in (33, 34)
        assert first != second
