"""Training and test rows of one user."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedbn.data.timesplit import split_user


def split(labels, recording=None, parts=None, stretch=None, test=0.25, gap=1, by_class=True):
    labels = np.asarray(labels)
    recording = np.zeros(len(labels), int) if recording is None else np.asarray(recording)
    stretch = recording if stretch is None else np.asarray(stretch)
    parts = None if parts is None else np.asarray(parts)
    index = np.arange(len(labels))
    return split_user(index, labels, recording, stretch, parts, test=test, gap=gap, by_class=by_class)


def test_interleaved_rows_are_split_in_time():
    found = split([0, 1] * 10)
    assert (found.kind, found.train.tolist(), found.test.tolist()) == ("time", list(range(14)), list(range(15, 20)))


def test_sorted_rows_are_split_by_class():
    found = split(np.repeat([2, 0, 1], 8), gap=2)
    assert found.kind == "class"
    assert found.test.tolist() == [6, 7, 14, 15, 22, 23]
    assert found.train.tolist() == [0, 1, 2, 3, 10, 11, 18, 19]
    assert split(np.repeat([2, 0, 1], 8), by_class=False).kind == "time"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=8),
    st.floats(0.1, 0.5),
    st.integers(0, 3),
)
def test_split_keeps_gap_and_never_repeats_rows(blocks, test, gap):
    labels = np.concatenate([np.full(n, c) for c, n in blocks])
    found = split(labels, test=test, gap=gap)
    train, tested = set(found.train.tolist()), set(found.test.tolist())
    assert not train & tested
    assert all(abs(a - b) > gap for a in train for b in tested)
    assert sorted(found.train) == list(found.train)
    if found.kind == "class":
        assert {int(labels[i]) for i in tested} <= {int(labels[i]) for i in train}
        sizes = {c: int((labels == c).sum()) for c in set(labels.tolist())}
        assert {int(labels[i]) for i in tested} <= {
            c for c, n in sizes.items() if n - max(1, round(test * n)) - gap >= 1
        }


def test_rows_of_other_stretches_are_no_neighbors():
    labels = np.repeat([0, 1], 4)
    assert split(labels).train.tolist() == [0, 1, 5]
    assert split(labels, stretch=np.repeat([0, 1], 4)).train.tolist() == [0, 1, 4, 5]


def test_class_between_test_rows_is_kept_for_training():
    found = split([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    assert found.kind == "class"
    assert found.test.tolist() == [3, 10]
    assert found.train.tolist() == [0, 1, 5, 6, 7, 8]


def test_recordings_of_one_class_each_are_split_by_class():
    labels, recording = np.repeat([0, 0, 1, 1, 2], 4), np.repeat(range(5), 4)
    found = split(labels, recording)
    assert found.kind == "class"
    assert found.test.tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 19]
    assert found.train.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17]


def test_later_recordings_are_test_rows_where_they_have_all_classes():
    found = split([0, 1] * 8, np.repeat(range(4), 4))
    assert (found.kind, found.train.tolist(), found.test.tolist()) == ("recording", list(range(12)), [12, 13, 14, 15])


def test_parts_of_the_data_set_come_first():
    parts = ["test", "train", "validation", "train"] * 3
    found = split([0] * 6 + [1] * 6, np.repeat(range(2), 6), parts)
    assert found.kind == "own"
    assert found.train.tolist() == [1, 3, 5, 7, 9, 11]
    assert found.test.tolist() == [0, 4, 8]
    assert found.validation.tolist() == [2, 6, 10]


def test_users_in_one_part_are_split_further():
    found = split([0, 1] * 8, parts=["test"] * 16)
    assert (found.kind, found.test.tolist()) == ("time", [12, 13, 14, 15])
    found = split([0, 1] * 8, parts=["validation"] * 16)
    assert (found.train.tolist(), found.test.tolist()) == ([], [])
    found = split([0, 1] * 8, parts=["train"] * 12 + ["validation"] * 4)
    assert (found.kind, found.test.tolist()) == ("time", [9, 10, 11])
