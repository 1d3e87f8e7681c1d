"""Split the rows of one user into training and test rows: in time, by recording, by class, or as the data set says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["own", "recording", "time", "class"]


@dataclass(frozen=True)
class Split:
    """Row numbers of one user.

    Attributes:
        train: training rows.
        test: test rows.
        kind: ``own`` parts of the data set, later ``recording``s, last rows in ``time``, or last rows of each
            ``class``.
        validation: rows that the data set reserves for validation.
    """

    train: np.ndarray
    test: np.ndarray
    kind: Kind
    validation: np.ndarray | None = None


def split_user(
    index: np.ndarray,
    labels: np.ndarray,
    recording: np.ndarray,
    stretch: np.ndarray,
    parts: np.ndarray | None,
    *,
    test: float,
    gap: int,
    by_class: bool,
) -> Split:
    """Split a user's rows.

    Parts of the data set are used as they are. Otherwise, later recordings are the test rows, or the last rows if
    there is one recording. If classes come in long runs and this leaves a class out of either side, the last rows of
    each class are the test rows.

    Args:
        index: the user's rows, in the order of recording.
        labels: class of each row of the data set.
        recording: recording of each row of the data set, numbered from 0 in the order of time.
        stretch: number of each row of the data set; rows of different stretches do not overlap.
        parts: ``train``, ``validation`` or ``test`` for each row of the data set; None if it has no parts.
        test: fraction of rows, or of recordings, for testing.
        gap: number of rows dropped between training and test rows of one recording.
        by_class: whether to split by class where a class would be left out.

    >>> rows, walk_then_sit, one = np.arange(8), np.repeat([0, 1], 4), np.zeros(8, int)
    >>> split = split_user(rows, walk_then_sit, one, one, None, test=0.25, gap=1, by_class=True)
    >>> split.kind, split.train.tolist(), split.test.tolist()
    ('class', [0, 1, 5], [3, 7])
    """
    if parts is not None:
        own = parts[index]
        chosen = {name: index[own == name] for name in ("train", "validation", "test")}
        if len(chosen["train"]) and len(chosen["test"]):
            validation = chosen["validation"] if len(chosen["validation"]) else None
            return Split(chosen["train"], chosen["test"], "own", validation)
        # The rows of a user in one part only are split further; rows for validation never train.
        index = chosen["train"] if len(chosen["train"]) else chosen["test"]
        if not len(index):
            return Split(index, index, "own", chosen["validation"])
    y, recorded = labels[index], recording[index]
    recordings = np.unique(recorded)
    if len(recordings) > 1:
        later = np.isin(recorded, _last(recordings, test))
        found = Split(index[~later], index[later], "recording")
    else:
        cut = len(index) - _share(len(index), test)
        found = Split(index[: max(0, cut - gap)], index[cut:], "time")
    if not by_class or not has_long_runs(y):
        return found
    splittable = [c for c in np.unique(y) if (n := int((y == c).sum())) - _share(n, test) - gap >= 1]
    if all(c in labels[side] for c in splittable for side in (found.train, found.test)):
        return found
    return _split_by_class(index, y, recorded, stretch[index], splittable, test, gap)


def has_long_runs(y: np.ndarray) -> bool:
    """Whether the class changes less than half as often as in random order.

    In random order, a small test set lacks classes by chance. A split by class would scatter its rows, and the gaps
    around them would take many training rows.

    >>> has_long_runs(np.repeat([0, 1, 2], 4)), has_long_runs(np.tile([0, 1, 2], 4))
    (True, False)
    """
    n, counts = len(y), np.bincount(y)
    changes = int((y[1:] != y[:-1]).sum())
    return changes < (n - float((counts * counts).sum()) / n) / 2


def _share(n: int, test: float) -> int:
    return max(1, round(test * n))


def _last(recordings: np.ndarray, test: float) -> np.ndarray:
    """The last share of at least two recordings; the first one is left for training."""
    return recordings[max(1, len(recordings) - _share(len(recordings), test)) :]


def _split_by_class(
    index: np.ndarray,
    y: np.ndarray,
    recorded: np.ndarray,
    stretch: np.ndarray,
    splittable: list[int],
    test: float,
    gap: int,
) -> Split:
    """The last rows of each class are test rows; its later recordings where each recording has one class.

    Training rows within ``gap`` rows of a test row of the same stretch are dropped. Classes with too few rows for both
    sides are training rows.
    """
    is_test = np.zeros(len(index), bool)
    pure = all(len(np.unique(y[recorded == r])) == 1 for r in np.unique(recorded))
    for c in splittable:
        rows = np.flatnonzero(y == c)
        recordings = np.unique(recorded[rows])
        if pure and len(recordings) > 1:
            is_test[rows] = np.isin(recorded[rows], _last(recordings, test))
        else:
            is_test[rows[len(rows) - _share(len(rows), test) :]] = True
    near = is_test.copy()
    for distance in range(1, min(gap, len(index) - 1) + 1):
        same = stretch[distance:] == stretch[:-distance]
        near[distance:] |= is_test[:-distance] & same
        near[:-distance] |= is_test[distance:] & same
    for c in splittable:  # test rows of its neighbors may have left a class without training rows
        if near[y == c].all():
            return _split_by_class(index, y, recorded, stretch, [k for k in splittable if k != c], test, gap)
    return Split(index[~near], index[is_test], "class")
