"""scikit-learn's handwritten digits, 8x8 pixels, made long-tailed: a real data set with nothing to download."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from rcl_fast.train.data.long_tail import ImbalanceShape, first_of_each_class, long_tailed_counts
from rcl_fast.train.data.samples import RawDataset, Samples, subset

VALIDATION_PER_CLASS = 20  # of the balanced images: held out of the long tail, a rare digit would have just one
TEST_PER_CLASS = 40


def digits_lt(imbalance: float, shape: ImbalanceShape) -> RawDataset:
    """Returns the digits: a long-tailed training set, and balanced validation and test sets.

    In the file's order, the first images of each digit train, later ones validate, and the last ones test.
    """
    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the file's values are 0 to 16
    everything = Samples(np.repeat(gray[..., None], 3, axis=-1), digits.target.astype(np.int64))
    images = np.bincount(everything.labels)
    before_test = first_of_each_class(everything.labels, images - TEST_PER_CLASS)
    left = images - TEST_PER_CLASS - VALIDATION_PER_CLASS
    before_validation = first_of_each_class(everything.labels, left)
    counts = long_tailed_counts(int(left.min()), len(left), imbalance, shape)
    return RawDataset(
        train=subset(everything, first_of_each_class(everything.labels, counts)),
        validation=subset(everything, np.setdiff1d(before_test, before_validation)),
        test=subset(everything, np.setdiff1d(np.arange(len(everything)), before_test)),
        class_names=[str(name) for name in digits.target_names],
    )
