"""Cut the streams of a table, one row per sample, into windows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from fedbn.data.columns import Rows
from fedbn.data.labels import plain
from fedbn.data.windows import hop, windows
from fedbn.errors import UserError

GAP = 1.9
"""A step in time longer than this number of usual steps is a gap; with one missing sample the step is 2."""


def cut_rows(
    rows: Rows,
    times: np.ndarray | None,
    window: int,
    overlap: float,
    labeling: Literal["majority", "constant"],
    name: str,
) -> tuple[Rows, list[str]]:
    """Cut streams with one sample per row into windows.

    A window never crosses users, recordings, parts of the data set, gaps in time or rows without a label. Its label is
    the one of most of its samples (ties: the first), or, with ``constant``, windows do not cross changes of the label.

    Args:
        rows: samples in the order of time; ``x`` is ``[n, channels]``.
        times: time of each sample; None if unknown.
        window: samples per window.
        overlap: fraction of a window that overlaps with the next one, in [0, 1).
        labeling: label of a window.
        name: file name, for messages.

    Returns:
        The windows, with ``x`` as ``[n, channels, window]``, and a notice about them.

    Raises:
        UserError: if no stretch is as long as a window.
    """
    import pandas as pd

    step = hop(window, overlap)
    if rows.x.ndim != 2:
        raise UserError(
            f"{name}: window= cuts streams with one sample per row, but rows of x have shape {list(rows.x.shape[1:])}; "
            "leave out window="
        )
    n, y = len(rows.x), plain(rows.y)
    if y.ndim != 1 or len(y) != n:
        raise UserError(f"{name}: window= needs one label per row, not labels of shape {list(y.shape)} for {n} rows")
    missing = np.asarray(pd.isna(y) | (pd.Series(y) == ""))
    labels = pd.factorize(pd.Series(y).where(~missing), use_na_sentinel=True)[0]
    owner, recording, part = (number(values, n) for values in (rows.user, rows.recording, rows.split))
    order = np.lexsort((recording, owner))
    constant = labels if labeling == "constant" else np.zeros(n, np.int64)
    keys = np.stack([owner, recording, part, missing, constant])[:, order]
    ends = (keys[:, 1:] != keys[:, :-1]).any(0)
    gaps = np.zeros(n - 1, bool)
    if times is not None:
        steps = np.diff(times[order])
        # Users may have different sampling rates.
        usual = pd.Series(np.where(~ends & (steps > 0), steps, np.nan)).groupby(owner[order][1:]).transform("median")
        gaps = ~ends & ((steps < 0) | (steps > GAP * usual.to_numpy()))
    bounds = [0, *(np.flatnonzero(ends | gaps) + 1), n]
    stretches = [order[a:b] for a, b in itertools.pairwise(bounds) if not missing[order[a]]]
    longest = max(map(len, stretches), default=0)
    if longest < window:
        what = "user, recording" + (" and label" if labeling == "constant" else "")
        raise UserError(
            f"{name}: window={window} is too long: the longest stretch of one {what} without gaps has {longest} samples"
        )
    x, first, label, origin = [], [], [], []
    for i, stretch in enumerate(stretches):
        if len(stretch) < window:
            continue
        cut = windows(torch.from_numpy(rows.x[stretch]), window, step)
        x.append(cut.numpy())
        first.append(stretch[: len(cut) * step : step])
        origin += [i] * len(cut)
        label += [_most(w) for w in np.lib.stride_tricks.sliding_window_view(labels[stretch], window)[::step]]
    at = np.concatenate(first)
    named = y[[int(np.flatnonzero(labels == k)[0]) for k in range(labels.max() + 1)]]
    found = replace(rows.take(at), x=np.concatenate(x), y=named[np.array(label)], stretch=np.array(origin))
    notice = (
        f"{name}: {n} rows are cut into {len(at)} windows of {window} samples, {step} apart; "
        + (
            "all samples of a window have its label"
            if labeling == "constant"
            else "a window has its most frequent label"
        )
        + f"; no window crosses one of {int(gaps.sum())} gaps in time" * bool(gaps.any())
        + f"; {int(missing.sum())} rows without a label are left out" * bool(missing.any())
    )
    return found, [notice]


def _most(labels: np.ndarray) -> int:
    """The most frequent label, the first of ties.

    >>> _most(np.array([2, 1, 1, 2, 0]))
    2
    """
    return int(labels[np.bincount(labels)[labels].argmax()])


def number(values: np.ndarray | None, n: int) -> np.ndarray:
    """Number values in the order of their first occurrence; zeros if there are none.

    >>> number(np.array([7, 7, 3, 7]), 4), number(None, 2)
    (array([0, 0, 1, 0]), array([0, 0]))
    """
    if values is None:
        return np.zeros(n, np.int64)
    import pandas as pd

    return pd.factorize(plain(values).ravel())[0].astype(np.int64)
