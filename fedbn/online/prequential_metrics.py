"""Metrics of prequential evaluation: accuracy, harm, regret, cost and alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from sklearn.metrics import f1_score

from fedbn.online.prequential import Floats, Trace

FADING = 0.99
"""Weight of a window relative to the next one in the fading metrics."""

HARM = 0.01
"""A user is harmed if its accuracy is lower than that of the source model by more than this."""

SMOOTH = 50
"""Windows of the moving average in `windows_to_close`, and windows for which the gap must remain closed."""


@dataclass(frozen=True)
class UserScore:
    """Metrics of one trace.

    Attributes:
        n: number of scored windows.
        accuracy, macro_f1: over all of them.
        faded_accuracy, faded_f1: with weights that decay by .99 per window from the end: performance at the end.
        nll: mean negative log-likelihood, in nats.
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
    """Metrics of a trace, without foreign windows.

    >>> import torch
    >>> from fedbn.streams import Stream
    >>> s = Stream("ann", torch.zeros(2, 1), torch.tensor([0, 1]), torch.zeros(2))
    >>> score(Trace.of(s, torch.tensor([[9.0, 0.0], [9.0, 0.0]]))).accuracy
    0.5
    """
    scored = trace.scored
    y, predicted = trace.y[scored], trace.predicted[scored]
    weights = FADING ** np.arange(len(y) - 1, -1, -1)
    correct = (y == predicted).astype(float)
    return UserScore(
        len(y),
        float(correct.mean()),
        float(f1_score(y, predicted, average="macro", zero_division=0.0)),
        float(np.average(correct, weights=weights)),
        float(f1_score(y, predicted, average="macro", zero_division=0.0, sample_weight=weights)),
        float(trace.nll[scored].mean()),
        calibration_error(trace.confidence[scored], correct),
    )


def calibration_error(confidence: Floats, correct: Floats, bins: int = 15) -> float:
    r"""Expected calibration error: :math:`\sum_b \frac{n_b}{n}|acc_b-conf_b|` over confidence bins of equal width.

    Guo, Pleiss, Sun, Weinberger, 2017, https://arxiv.org/abs/1706.04599

    Args:
        confidence: ``[n]`` in [0, 1].
        correct: ``[n]`` 0 or 1.
        bins: number of bins.

    >>> calibration_error(np.array([0.9, 0.9]), np.array([1.0, 0.0]))
    0.4
    """
    bin_ = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def fading_mean(correct: Floats, factor: float = FADING) -> Floats:
    r"""Fading mean at each window t: :math:`\sum_i f^{t-i}c_i/\sum_i f^{t-i}` over the scored windows.

    Gama, Sebastião, Rodrigues, 2013, *On evaluating stream learning algorithms*, Machine Learning 90.

    Args:
        correct: ``[n]``, NaN for windows that are not scored; the first window must be scored.
        factor: f.

    >>> fading_mean(np.array([1.0, 0.0]), 0.5).round(3).tolist()
    [1.0, 0.333]
    """
    scored = ~np.isnan(correct)
    filters = [1.0], [1.0, -factor]
    total = lfilter(*filters, np.where(scored, correct, 0.0))
    weight = lfilter(*filters, scored.astype(float))
    return np.asarray(total / np.where(weight > 0, weight, np.nan))


def worst_decile(values: Sequence[float]) -> float:
    """Mean over the worst tenth of the users, at least one user.

    >>> worst_decile([0.9, 0.2, 0.7])
    0.2
    """
    ordered = sorted(values)
    return float(np.mean(ordered[: max(1, len(ordered) // 10)]))


def harmed(values: Sequence[float], unadapted: Sequence[float]) -> float:
    """Share of users more than a percentage point below the source; both in the same order.

    >>> harmed([0.90, 0.70], [0.905, 0.80])
    0.5
    """
    return float(np.mean(np.asarray(unadapted) - np.asarray(values) > HARM + 1e-12))


def regret(traces: Sequence[Trace], unadapted: Sequence[Trace], oracle: Sequence[Trace]) -> float:
    r"""Excess errors over the oracle, relative to the source: 0 oracle, 1 source, above 1 harmful.

    :math:`\sum(\ell-\ell_{oracle})/\sum(\ell_{source}-\ell_{oracle})` with zero-one loss over all users' windows; NaN
    if the oracle is no better than the source.

    Raises:
        ValueError: the traces belong to different streams.
    """
    rule, base, best = (np.nanmean(_correct_table(t, traces)) for t in (traces, unadapted, oracle))
    return float((best - rule) / (best - base)) if best > base else math.nan


def windows_to_close(
    share: float, traces: Sequence[Trace], unadapted: Sequence[Trace], oracle: Sequence[Trace]
) -> int | None:
    """Windows until ``share`` of the gap between source and oracle is closed for `SMOOTH` windows.

    Accuracies are means over the users and the last `SMOOTH` windows, all three on the same windows.

    Returns:
        Number of windows (at least `SMOOTH`); None if the gap is not closed within the streams (censored), or if there
        is no gap.

    Raises:
        ValueError: the traces belong to different streams.
    """
    rule, base, best = (_moving(_correct_table(t, traces)) for t in (traces, unadapted, oracle))
    if len(rule) < SMOOTH or not np.nanmean(best) > np.nanmean(base):
        return None
    closed = (rule >= base + share * (best - base) - 1e-12).astype(int)
    runs = np.convolve(closed, np.ones(SMOOTH, int), "valid")
    first = np.flatnonzero(runs == SMOOTH)
    return int(first[0]) + SMOOTH if len(first) else None


def _moving(correct: Floats) -> Floats:
    """Moving average over users and the last `SMOOTH` windows, ``[windows - SMOOTH + 1]``."""
    ones = np.ones(SMOOTH)
    total = np.convolve(np.nansum(correct, 0), ones, "valid")
    count = np.convolve((~np.isnan(correct)).sum(0), ones, "valid")
    return np.asarray(total / np.maximum(count, 1))


def _correct_table(traces: Sequence[Trace], reference: Sequence[Trace]) -> Floats:
    """``[users, windows]`` with 1 for correct predictions; NaN where nothing is scored."""
    if [t.digest for t in traces] != [t.digest for t in reference]:
        raise ValueError("traces of different streams cannot be compared")
    out = np.full((len(traces), max(len(t.y) for t in traces)), np.nan)
    for row, trace in zip(out, traces, strict=True):
        row[: len(trace.y)] = trace.correct
    return out


@dataclass(frozen=True)
class Cost:
    """Cost of adaptation: microseconds per window (median, 99th percentile) and bytes of state per user."""

    us_p50: float
    us_p99: float
    bytes_per_user: float


def cost(traces: Sequence[Trace], bytes_per_user: float) -> Cost:
    """Cost over the windows of all traces, without the first ten of each trace (warm-up)."""
    micro = 1e6 * np.concatenate([t.seconds[min(10, len(t.seconds) - 1) :] for t in traces])
    return Cost(float(np.percentile(micro, 50)), float(np.percentile(micro, 99)), bytes_per_user)


@dataclass(frozen=True)
class Alarms:
    """Performance of a drift detector.

    Attributes:
        delays: windows from each detected change to its first alarm.
        missed: number of changes that were not detected.
        false_per_1000: false alarms per thousand windows.
    """

    delays: tuple[int, ...]
    missed: int
    false_per_1000: float


def judge_alarms(alarms: Sequence[int], changes: Sequence[int], n: int, patience: int = 100) -> Alarms:
    """Match alarms to changes. An alarm is correct within ``patience`` windows of a change and before the next.

    Args:
        alarms: number of windows at each alarm.
        changes: number of windows before each change.
        n: length of the stream.
        patience: maximum delay of a detection, in windows.

    >>> judge_alarms([5, 130, 140], [100], n=1000)
    Alarms(delays=(30,), missed=0, false_per_1000=1.0)
    """
    ends = [min(end, start + patience) for start, end in zip(changes, [*changes, n][1:], strict=True)]
    matched = [[a for a in alarms if start <= a < end] for start, end in zip(changes, ends, strict=True)]
    delays = tuple(min(near) - start for start, near in zip(changes, matched, strict=True) if near)
    return Alarms(delays, len(changes) - len(delays), 1000 * (len(alarms) - sum(map(len, matched))) / n)
