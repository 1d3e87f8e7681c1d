"""Bring recordings of sensors with gaps and uneven sampling to one rate."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

MAX_GAP = 0.25
"""Longest time in seconds without a sample that is interpolated; a longer one divides the recording."""


@dataclass(frozen=True)
class Samples:
    """Samples of one recording.

    Attributes:
        times: ``[n]`` seconds.
        values: ``[n, channels]``.
        labels: class of each sample, ``[n]`` int64; `fedbn.data.examples.UNLABELED` for none.
    """

    times: np.ndarray
    values: np.ndarray
    labels: np.ndarray

    def take(self, index: np.ndarray | slice) -> Samples:
        """Select samples."""
        return Samples(self.times[index], self.values[index], self.labels[index])


def resample(samples: Samples, rate: float, max_gap: float = MAX_GAP) -> Samples:
    """Samples at equal distances, as float32.

    Samples with missing values are left out, and the others are connected by lines. Where samples are denser than
    ``rate``, the line is read at a multiple of the rate, and a low-pass filter removes what the rate cannot represent
    (`scipy.signal.resample_poly`). A stretch without samples longer than ``max_gap`` stays a gap in the times, and so
    does a time that goes back. Each sample has the label of the nearest one before it.

    Args:
        samples: a recording, in the order of recording; values and times may be NaN.
        rate: samples per second.
        max_gap: longest interpolated gap, in seconds.

    >>> t = np.array([0, 1, 2, 3, 20, 21]) / 2
    >>> found = resample(Samples(t, t[:, None], np.array([0, 0, 1, 1, 1, 1])), rate=4, max_gap=1)
    >>> found.times.tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 10.0, 10.25, 10.5]
    >>> found.values[:, 0].tolist() == found.times.tolist(), found.labels.tolist()
    (True, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    """
    present = np.isfinite(samples.values).all(1) & np.isfinite(samples.times)
    samples = samples.take(present)
    samples = samples.take(np.r_[True, np.diff(samples.times) != 0][: len(samples.times)])
    steps = np.diff(samples.times)
    bounds = np.flatnonzero((steps < 0) | (steps > max_gap)) + 1
    pieces = [
        _resample_piece(samples.take(slice(a, b)), rate)
        for a, b in itertools.pairwise([0, *bounds, len(samples.times)])
        if b - a > 1
    ]
    channels = samples.values.shape[1]
    return Samples(
        np.concatenate([np.zeros(0), *(p.times for p in pieces)]),
        np.concatenate([np.zeros((0, channels), np.float32), *(p.values for p in pieces)]),
        np.concatenate([np.zeros(0, np.int64), *(p.labels for p in pieces)]),
    )


def _resample_piece(piece: Samples, rate: float) -> Samples:
    """Resample samples without gaps."""
    # Imported here because listing the scenarios does not need scipy.
    from scipy.signal import resample_poly

    times = piece.times - piece.times[0]
    factor = max(1, round(1 / (rate * float(np.median(np.diff(times))))))
    # The margin lets the last sample be on the grid in spite of rounding.
    grid = np.arange(int(times[-1] * rate * factor + 1e-3) + 1) / (rate * factor)
    values = np.stack([np.interp(grid, times, channel) for channel in piece.values.T], axis=1)
    if factor > 1:
        values = resample_poly(values, 1, factor, axis=0, padtype="line")
    grid = grid[::factor]
    before = np.searchsorted(times, grid + 1e-3 / rate, side="right") - 1
    return Samples(piece.times[0] + grid, values.astype(np.float32), piece.labels[before])
