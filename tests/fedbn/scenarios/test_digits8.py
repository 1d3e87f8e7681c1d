"""The 8x8 digits are read without scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn import datasets

from fedbn.scenarios.digits8 import load_digits


def test_load_digits_matches_scikit_learn():
    pixels, labels = datasets.load_digits(return_X_y=True)
    actual = load_digits()
    assert np.array_equal(actual[0], pixels)
    assert np.array_equal(actual[1], labels)
