"""Metrics of prequential evaluation: accuracy, harm, regret, cost and alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from sklearn.metrics import f1_score

from fedbn.online.prequential import Floats, Trace, _side_by_side

FADING = 0.99
"""Weight of a window relative to the one after it in the fading measures."""


HARM = 0.01
"""A user is harmed who loses more than this against the source model."""


SMOOTH = 50
"""Windows of the moving average by which "closed the gap, and stayed" is judged."""


@dataclass(frozen=True)
class UserScore:
    """One trace in numbers.

    Attributes:
        n: windows scored.
        accuracy, macro_f1: over all of them.
        faded_accuracy, faded_f1: with weight .99 a step back from the end: where the user stands at last.
        nll: mean, in nats.
        ece: expected calibration error.
    """

    n: int
    accuracy: float
    macro_f1: float
    faded_accuracy: float
    faded_f1: float
    nll: float
    ece: float


def score(trace: Trace) -> UserScore:
    """A trace in numbers; foreign windows left out.

    >>> import torch
    >>> from fedbn.streams import Stream
    >>> s = Stream("ann", torch.zeros(2, 1), torch.tensor([0, 1]), torch.zeros(2))
    >>> score(Trace.of(s, torch.tensor([[9.0, 0.0], [9.0, 0.0]]))).accuracy
    0.5
    """
    keep = trace.scored
    y, said = trace.y[keep], trace.predicted[keep]
    faded = FADING ** np.arange(len(y) - 1, -1, -1)
    right = (y == said).astype(float)
    return UserScore(
        len(y),
        float(right.mean()),
        float(f1_score(y, said, average="macro", zero_division=0.0)),
        float(np.average(right, weights=faded)),
        float(f1_score(y, said, average="macro", zero_division=0.0, sample_weight=faded)),
        float(trace.nll[keep].mean()),
        calibration_error(trace.confidence[keep], right),
    )


def calibration_error(confidence: Floats, right: Floats, bins: int = 15) -> float:
    r"""Expected calibration error: :math:`\sum_b \frac{n_b}{n}|acc_b-conf_b|` over equal bins of confidence.

    Guo, Pleiss, Sun, Weinberger, 2017, https://arxiv.org/abs/1706.04599

    Args:
        confidence: ``[n]`` in [0, 1].
        right: ``[n]`` 0 or 1.
        bins: how many.

    >>> calibration_error(np.array([0.9, 0.9]), np.array([1.0, 0.0]))
    0.4
    """
    bin_ = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def faded(correct: Floats, factor: float = FADING) -> Floats:
    r"""The fading mean at each window, :math:`\sum_i f^{t-i}c_i/\sum_i f^{t-i}` over the windows that count.

    Gama, Sebastião, Rodrigues, 2013, *On evaluating stream learning algorithms*, Machine Learning 90.

    Args:
        correct: ``[n]``, NaN where a window does not count; the first counts.
        factor: f.

    >>> faded(np.array([1.0, 0.0]), 0.5).round(3).tolist()
    [1.0, 0.333]
    """
    counts = ~np.isnan(correct)
    filters = [1.0], [1.0, -factor]
    total = lfilter(*filters, np.where(counts, correct, 0.0))
    weight = lfilter(*filters, counts.astype(float))
    return np.asarray(total / np.where(weight > 0, weight, np.nan))


def worst_decile(values: Sequence[float]) -> float:
    """Mean over the lowest tenth of the users, at least one of them.

    >>> worst_decile([0.9, 0.2, 0.7])
    0.2
    """
    ordered = sorted(values)
    return float(np.mean(ordered[: max(1, len(ordered) // 10)]))


def harmed(values: Sequence[float], unadapted: Sequence[float]) -> float:
    """Share of users more than a point below the source, the same users in the same order.

    >>> harmed([0.90, 0.70], [0.905, 0.80])
    0.5
    """
    return float(np.mean(np.asarray(unadapted) - np.asarray(values) > HARM + 1e-12))


def regret(traces: Sequence[Trace], unadapted: Sequence[Trace], oracle: Sequence[Trace]) -> float:
    r"""Errors above the oracle's in units of the source's: 0 as good, 1 useless, above 1 harmful.

    :math:`\sum(\ell-\ell_{oracle})/\sum(\ell_{source}-\ell_{oracle})` with zero-one loss over all users' windows; NaN
    where the oracle is no better than the source.

    Raises:
        ValueError: the traces are not of the same streams.
    """
    rule, base, best = (np.nanmean(_side_by_side(t, traces)) for t in (traces, unadapted, oracle))
    return float((best - rule) / (best - base)) if best > base else math.nan


def windows_to_close(
    part: float, traces: Sequence[Trace], unadapted: Sequence[Trace], oracle: Sequence[Trace]
) -> int | None:
    """Windows until ``part`` of the gap between source and oracle is closed, and stays so for 50 windows.

    Accuracies are means over the users and the last 50 windows, all three on the same windows.

    Returns:
        Windows learnt from when it is first so (at least `SMOOTH`); None if never within the streams (censored), or if
        there is no gap.

    Raises:
        ValueError: the traces are not of the same streams.
    """
    rule, base, best = (_moving(_side_by_side(t, traces)) for t in (traces, unadapted, oracle))
    if len(rule) < SMOOTH or not np.nanmean(best) > np.nanmean(base):
        return None
    good = (rule >= base + part * (best - base) - 1e-12).astype(int)
    runs = np.convolve(good, np.ones(SMOOTH, int), "valid")
    held = np.flatnonzero(runs == SMOOTH)
    return int(held[0]) + SMOOTH if len(held) else None


def _moving(correct: Floats) -> Floats:
    """Mean over users and the last `SMOOTH` windows, ``[windows - SMOOTH + 1]``."""
    ones = np.ones(SMOOTH)
    right = np.convolve(np.nansum(correct, 0), ones, "valid")
    count = np.convolve((~np.isnan(correct)).sum(0), ones, "valid")
    return np.asarray(right / np.maximum(count, 1))


@dataclass(frozen=True)
class Cost:
    """What following costs: microseconds a window, median and 99th percentile, and bytes of state a user."""

    us_p50: float
    us_p99: float
    bytes_per_user: float


def cost(traces: Sequence[Trace], bytes_per_user: float) -> Cost:
    """Times of all windows of all traces together; the first ten of each trace warm up and do not count."""
    micro = 1e6 * np.concatenate([t.seconds[min(10, len(t.seconds) - 1) :] for t in traces])
    return Cost(float(np.percentile(micro, 50)), float(np.percentile(micro, 99)), bytes_per_user)


@dataclass(frozen=True)
class Alarms:
    """How well alarms fit changes.

    Attributes:
        delays: windows from each change that was noticed to its first alarm.
        missed: changes without an alarm in time.
        false_per_1000: alarms in reach of no change, in a thousand windows.
    """

    delays: tuple[int, ...]
    missed: int
    false_per_1000: float


def judge_alarms(alarms: Sequence[int], changes: Sequence[int], n: int, patience: int = 100) -> Alarms:
    """Match alarms with changes: those within ``patience`` windows of a change, before the next one, are its own.

    Args:
        alarms: windows after which the detector spoke.
        changes: windows before which something changed.
        n: length of the stream.
        patience: windows that a detector may take.

    >>> judge_alarms([5, 130, 140], [100], n=1000)
    Alarms(delays=(30,), missed=0, false_per_1000=1.0)
    """
    ends = [min(end, start + patience) for start, end in zip(changes, [*changes, n][1:], strict=True)]
    theirs = [[a for a in alarms if start <= a < end] for start, end in zip(changes, ends, strict=True)]
    delays = tuple(min(near) - start for start, near in zip(changes, theirs, strict=True) if near)
    return Alarms(delays, len(changes) - len(delays), 1000 * (len(alarms) - sum(map(len, theirs))) / n)
