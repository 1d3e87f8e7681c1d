"""Windows cut from streams with one sample per row."""

from __future__ import annotations

import numpy as np
import pytest

from fedbn.data.columns import Columns, Rows
from fedbn.data.cutting import cut_rows
from fedbn.data.times import read_times, sort_in_time
from tests.fedbn.helpers import rejects

N = 64


def stream(**changed):
    """One user's stream; each sample is its number."""
    rows = {
        "x": np.arange(N, dtype=np.float32)[:, None],
        "y": np.arange(N) // 32,
        "user": np.zeros(N),
        "recording": None,
    }
    return Rows(**(rows | changed))


def starts(rows, times=None, window=16, overlap=0.5, labeling="majority"):
    found, notices = cut_rows(rows, times, window, overlap, labeling, "own")
    first = found.x[:, 0, 0].astype(int)
    assert np.array_equal(found.x[:, 0], first[:, None] + np.arange(window))
    assert len(notices) == 1
    return first.tolist(), found


def test_windows_have_their_most_frequent_label():
    first, found = starts(stream())
    assert first == list(range(0, 49, 8))
    assert found.x.shape == (7, 1, 16)
    assert found.y.tolist() == [0, 0, 0, 0, 1, 1, 1]  # of the one half and half, the first
    assert starts(stream(y=np.array(["b", "a"])[np.arange(N) // 32]))[1].y.tolist() == ["b"] * 4 + ["a"] * 3


def test_windows_of_constant_labels_do_not_cross_them():
    first, found = starts(stream(), labeling="constant")
    assert first == [0, 8, 16, 32, 40, 48]
    assert found.y.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("column", ["user", "recording", "split"])
def test_windows_do_not_cross(column):
    values = np.array(["a"] * 20 + ["b"] * 44)
    first, found = starts(stream(**{column: values}))
    assert first == [0, 20, 28, 36, 44]
    assert getattr(found, column).tolist() == ["a"] + ["b"] * 4


def test_windows_of_interleaved_users_are_apart():
    rows = stream(x=np.repeat(np.arange(32, dtype=np.float32), 2)[:, None], user=np.tile([1, 0], 32))
    first, found = starts(rows)
    assert first == [0, 8, 16, 0, 8, 16]
    assert found.user.tolist() == [1, 1, 1, 0, 0, 0]


def test_windows_do_not_cross_gaps_in_time():
    times = np.arange(N) * 0.02
    assert starts(stream(), times)[0] == list(range(0, 49, 8))
    times[20:] += 0.02  # one sample is missing
    assert starts(stream(), times)[0] == [0, 20, 28, 36, 44]
    times[20:] -= 1.0  # time starts again
    assert starts(stream(), times)[0] == [0, 20, 28, 36, 44]
    rates = np.concatenate([np.arange(32) * 0.01, np.arange(32) * 0.1])  # every user has a rate
    assert starts(stream(user=np.arange(N) // 32), rates)[0] == [0, 8, 16, 32, 40, 48]


def test_windows_leave_out_rows_without_label():
    y = np.where((np.arange(N) >= 20) & (np.arange(N) < 24), np.nan, 1.0)
    first, found = starts(stream(y=y))
    assert first == [0, 24, 32, 40, 48]
    assert not np.isnan(found.y).any()


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, {"window": 65}, "window=65 is too long: the longest stretch of one user, recording without gaps has 64"),
        ({}, {"window": 40, "labeling": "constant"}, "one user, recording and label without gaps has 32 samples"),
        ({}, {"window": 4}, "window=4 is too short"),
        ({}, {"overlap": 1.0}, "overlap=1.0 must be at least 0 and below 1"),
        ({"x": np.zeros((N, 3, 8), np.float32)}, {}, r"rows of x have shape \[3, 8\]; leave out window="),
        ({"y": np.zeros((N, 2))}, {}, "window= needs one label per row"),
    ],
)
def test_windows_reject_other_data(changed, options, message):
    rejects(message, starts, stream(**changed), **options)


def times(values, column="time", name="time"):
    return read_times(Columns([name], lambda _: np.asarray(values)), column, "own")


def test_times_are_numbers_or_dates():
    assert times([0.0, 0.5], name="Timestamp").tolist() == [0, 0.5]
    assert np.diff(times(["2020-01-01 00:00:00", "2020-01-01 00:00:02"], name="t")).tolist() == [2e9]
    assert np.diff(times(["2020-01-01T00:00:00Z", "2020-01-01T00:00:02+00:00"])).tolist() == [2e9]
    assert times(["morning", "noon"]) is None
    assert times([1, 2], name="other") is None
    assert times([1, 2], column="") is None
    rejects("'start' holds no times", times, ["morning", "noon"], "start", "start")
    rejects("unknown column for time", times, [1, 2], "start", "other")


def test_shuffled_rows_are_sorted_in_time():
    order = np.random.default_rng(0).permutation(N)
    rows, when, notices = sort_in_time(stream().take(order), order.astype(float), "own")
    assert rows.x[:, 0].tolist() == when.tolist() == list(range(N))
    assert notices == ["own: rows are not in order of time and are sorted (time= leaves them)"]


def test_time_that_starts_again_is_not_sorted():
    rows, _, notices = sort_in_time(stream(), np.tile(np.arange(16.0), 4), "own")
    assert rows.x[:, 0].tolist() == list(range(N))
    assert not notices
