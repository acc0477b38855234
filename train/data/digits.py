"""scikit-learn's handwritten digits, 8x8 pixels, made long-tailed: a real data set with nothing to download."""

import numpy as np
from sklearn.datasets import load_digits

from rcl_fast.train.data.long_tail import ImbalanceShape, first_of_each_class, long_tailed_counts
from rcl_fast.train.data.samples import Published, Samples, take

VALIDATION_PER_CLASS = 20  # held out of the long tail, a rare digit would have one image to be judged by
TEST_PER_CLASS = 40


def digits_lt(imbalance: float, shape: ImbalanceShape) -> Published:
    """In the file's order of each digit: the first images train, the last ones validate and then test, balanced."""
    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the file's values are 0 to 16
    everything = Samples(np.repeat(gray[..., None], 3, axis=-1), digits.target.astype(np.int64))
    images = np.bincount(everything.labels)
    before_test = first_of_each_class(everything.labels, images - TEST_PER_CLASS)
    left = images - TEST_PER_CLASS - VALIDATION_PER_CLASS
    before_validation = first_of_each_class(everything.labels, left)
    counts = long_tailed_counts(int(left.min()), len(left), imbalance, shape)
    return Published(
        train=take(everything, first_of_each_class(everything.labels, counts)),
        validation=take(everything, np.setdiff1d(before_test, before_validation)),
        test=take(everything, np.setdiff1d(np.arange(len(everything)), before_test)),
        class_names=[str(name) for name in digits.target_names],
    )
