"""Values of examples: columns, axis order, scale and series of different lengths."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedbn.data.columns import Columns
from fedbn.data.values import channels_first, read_values, rescale
from tests.fedbn.helpers import rejects


def columns(**arrays):
    return Columns(list(arrays), lambda name: np.asarray(arrays[name]))


TABLE = columns(**{"imu:acc_x": [1, 2], "b": [3, 4], "x10": [5, 6], "x2": [7, 8], "y": [0, 1]})


@pytest.mark.parametrize(
    ("selection", "row"),
    [
        ("x", [7, 5]),
        ("imu:acc_x", [1]),
        ("imu:acc_x+b", [1, 3]),
        ("imu:acc_x..x10", [1, 3, 5]),
        ("imu:acc_x..b+x2", [1, 3, 7]),
        ("B", [3]),
    ],
)
def test_read_values_selects_columns(selection, row):
    assert read_values(TABLE, selection, "own")[0].tolist() == row


def test_read_values_rejects_unknown_and_reversed_columns():
    rejects("unknown column for x 'z'", read_values, TABLE, "b+z", "own")
    rejects("'b' comes before 'x10'; write x=b..x10", read_values, TABLE, "x10..b", "own")


@pytest.mark.parametrize(
    ("shape", "became"),
    [
        ((32, 30, 3), (3, 32, 30)),
        ((32, 30, 1), (1, 32, 30)),
        ((32, 30, 4), (4, 32, 30)),
        ((16, 16, 7), (7, 16, 16)),
        ((3, 32, 30), (3, 32, 30)),
        ((7, 16, 16), (7, 16, 16)),
        ((3, 16, 3), (3, 16, 3)),
        ((9, 16, 7), (9, 16, 7)),
        ((28, 28), (1, 28, 28)),
        ((128, 6), (6, 128)),
        ((6, 128), (6, 128)),
        ((30, 12), (30, 12)),
        ((784,), (784,)),
    ],
)
def test_channels_first_recognizes_layouts(shape, became):
    x = np.random.default_rng(0).random((2, *shape))
    found, notices = channels_first(x, "auto", "own")
    assert found.shape[1:] == became
    assert bool(notices) == (shape != became or shape == (30, 12))
    if sorted(shape) == sorted(became) and shape != became:
        assert np.array_equal(np.moveaxis(found, 1, -1), x)
    assert channels_first(x, "first", "own")[0] is x


def test_channels_first_obeys_layout():
    assert channels_first(np.zeros((2, 30, 12)), "last", "own")[0].shape == (2, 12, 30)
    assert channels_first(np.zeros((2, 5)), "last", "own")[0].shape == (2, 5)
    assert channels_first(np.zeros((2, 6, 9), np.uint8), "auto", "own")[0].shape == (2, 1, 6, 9)


@pytest.mark.parametrize(
    ("x", "top", "reported"),
    [
        (np.full((1, 1, 2, 2), 255, np.uint8), 1.0, "has 8 bits and is divided by 255"),
        (np.full((1, 4), 51, np.uint8), 0.2, "has 8 bits and is divided by 255"),
        (np.ones((1, 1, 2, 2), np.uint8), 1.0, ""),
        (np.full((1, 1, 2, 2), 65535, np.uint16), 1.0, "has 16 bits and is divided by 65535"),
        (np.full((1, 3, 9), 500, np.uint16), 500.0, ""),
        (np.full((1, 1, 2, 2), 255), 255.0, "holds whole numbers to 255 and is not scaled"),
        (np.full((1, 1, 2, 2), 0.5), 0.5, ""),
        (np.ones((1, 2), bool), 1.0, ""),
    ],
)
def test_rescale_depends_on_type(x, top, reported):
    values, notices = rescale(x, 0, "own")
    assert values.dtype == np.float32
    assert values.max() == np.float32(top)
    assert reported in " ".join(notices)
    assert bool(notices) == bool(reported)
    assert rescale(x, 2, "own")[0].max() == x.max() / np.float32(2)


def series(*shapes):
    out = np.empty(len(shapes), object)
    for i, shape in enumerate(shapes):
        out[i] = np.full(shape, i + 1.0)
    return columns(x=pd.Series(out).to_numpy())


@pytest.mark.parametrize("shapes", [((2, 3), (2, 5)), ((3, 2), (5, 2)), ((3,), (5,))])
def test_series_of_different_lengths_are_rejected_or_padded(shapes):
    ragged = series(*shapes)
    rejects("differ in shape .*, or set length=5 to pad them with zeros at the end", read_values, ragged, "x", "own")
    found = read_values(ragged, "x", "own", length=4)
    assert found.shape == ((2, 2, 4) if len(shapes[0]) > 1 else (2, 4))
    assert (found[0, ..., :3] == 1).all()
    assert (found[0, ..., 3:] == 0).all()
    assert (found[1] == 2).all()


def test_images_of_different_sizes_are_not_padded():
    rejects("differ in shape .*; bring them to one shape$", read_values, series((2, 3), (3, 4)), "x", "own", length=4)
    rejects("bring them to one shape$", read_values, series((2, 3, 3), (2, 3, 4)), "x", "own", length=4)
