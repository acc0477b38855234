import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcl_fast.train.data.long_tail import first_of_each_class, held_out, long_tailed_counts

labels_of_any_size = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(np.array)


@pytest.mark.parametrize(
    ("n_max", "num_classes", "total"),
    [(500, 100, 10_847), (5_000, 10, 12_406)],  # CIFAR-100-LT and CIFAR-10-LT at 100, as in the literature
)
def test_exponential_counts_are_the_literatures(n_max: int, num_classes: int, total: int) -> None:
    counts = long_tailed_counts(n_max, num_classes, 100, "exponential")
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (n_max, n_max // 100)
    assert counts.tolist() == [
        int(n_max * 0.01 ** (k / (num_classes - 1.0))) for k in range(num_classes)
    ]  # the usual code


def test_step_counts() -> None:
    assert long_tailed_counts(500, 4, 10, "step").tolist() == [500, 500, 50, 50]


@pytest.mark.parametrize("shape", ["exponential", "step"])
def test_one_class_keeps_everything(shape: str) -> None:
    assert long_tailed_counts(7, 1, 100, shape).tolist() == [7]


@pytest.mark.parametrize("shape", ["exponential", "step"])
@given(n_max=st.integers(1, 5_000), num_classes=st.integers(2, 120), imbalance=st.integers(1, 1_000))
def test_counts_fall_from_n_max_to_n_max_over_imbalance(
    shape: str, n_max: int, num_classes: int, imbalance: int
) -> None:
    counts = long_tailed_counts(n_max, num_classes, imbalance, shape)
    assert len(counts) == num_classes
    assert counts[0] == n_max
    assert counts[-1] == max(n_max // imbalance, 1)
    assert (np.diff(counts) <= 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 10, 10, "exponential"),
        (5, 0, 10, "exponential"),
        (5, 10, 0.5, "step"),
        (5, 10, float("nan"), "step"),
        (5, 10, 10, "linear"),
    ],
)
def test_impossible_counts_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"long tail|imbalance"):
        long_tailed_counts(*arguments)


def test_first_of_each_class_takes_them_in_the_given_order() -> None:
    assert first_of_each_class([1, 0, 1, 0, 1, 2], [1, 2, 0]).tolist() == [0, 1, 2]


@given(labels=labels_of_any_size, data=st.data())
def test_smaller_sets_lie_in_larger_ones(labels: np.ndarray, data: st.DataObject) -> None:
    larger = [data.draw(st.integers(0, int(n))) for n in np.bincount(labels)]
    smaller = [data.draw(st.integers(0, n)) for n in larger]
    kept = first_of_each_class(labels, larger)
    assert np.bincount(labels[kept], minlength=len(larger)).tolist() == larger
    assert set(first_of_each_class(labels, smaller)) <= set(kept)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 and 3 are needed"):
        first_of_each_class([0, 1, 1], [1, 3])


@given(labels=labels_of_any_size, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_held_out_is_a_stratified_partition(labels: np.ndarray, fraction: float, seed: int) -> None:
    train, validation = held_out(labels, fraction, seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    sizes = np.bincount(labels, minlength=7)
    out = np.bincount(labels[validation], minlength=7)
    for size, held in zip(sizes, out, strict=True):
        if size < 2:
            assert held == 0
        else:
            assert held == min(max(round(fraction * size), 1), size - 1)
    again = held_out(labels, fraction, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(validation, again[1])


def test_held_out_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(5), 40)
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    first, second = held_out(labels, 0.1, 1)[1], held_out(labels, 0.1, 2)[1]
    assert not np.array_equal(first, second)
    np.testing.assert_equal(np.random.get_state(legacy=False), state)  # noqa: NPY002


def test_held_out_is_not_simply_the_first_samples() -> None:
    _, validation = held_out(np.zeros(1_000, int), 0.1, 0)
    assert len(validation) == 100
    assert 350 < validation.mean() < 650


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        held_out([0, 0], fraction, 0)
