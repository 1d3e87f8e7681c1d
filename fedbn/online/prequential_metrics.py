"""Metrics of prequential evaluation: scores of users, harm, regret, cost and alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike

from fedbn.online.traces import ClassTrace, Floats, Trace
from fedbn.tasks import Task
from fedbn.tasks.metrics import mean_f1

FADING = 0.99
"""Weight of a window relative to the next one in the fading metrics."""

HARM = 0.01
"""A user is harmed if its accuracy is lower than that of the source model by more than this.

For a metric that is not a share, such as an error with a unit, this is relative to the source model's value.
"""

SMOOTH = 50
"""Windows of the moving average in `windows_to_close`, and windows for which the gap must remain closed."""


def scores(trace: Trace, task: Task) -> dict[str, float]:
    """All measures of a trace, by name: those of `score` for predicted classes, else the metrics of the task.

    The latter come with the number of scored windows ``n``, and with the fading mean of the task's
    `fedbn.tasks.Task.example_metric`.
    """
    if isinstance(trace, ClassTrace):
        return asdict(score(trace))
    values = trace.values[trace.scored]
    faded = {f"faded_{task.example_metric}": float(np.average(values, weights=_fading_weights(len(values))))}
    return {"n": len(values), **trace.metrics, **faded}


def _fading_weights(n: int) -> Floats:
    return np.asarray(FADING ** np.arange(n - 1, -1, -1), float)


@dataclass(frozen=True)
class UserScore:
    """Metrics of one trace of classes.

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


def score(trace: ClassTrace) -> UserScore:
    """Metrics of a trace, without foreign windows.

    >>> import torch
    >>> from fedbn.streams import Stream
    >>> s = Stream("ann", torch.zeros(2, 1), torch.tensor([0, 1]), torch.zeros(2))
    >>> score(ClassTrace.of_logits(s, torch.tensor([[9.0, 0.0], [9.0, 0.0]]))).accuracy
    0.5
    """
    scored = trace.scored
    y, predicted = trace.y[scored], trace.predicted[scored]
    weights = _fading_weights(len(y))
    correct = (y == predicted).astype(float)
    return UserScore(
        len(y),
        float(correct.mean()),
        _macro_f1(y, predicted, np.ones(len(y))),
        float(np.average(correct, weights=weights)),
        _macro_f1(y, predicted, weights),
        float(trace.nll[scored].mean()),
        calibration_error(trace.confidence[scored], correct),
    )


def _macro_f1(y: np.ndarray, predicted: np.ndarray, weights: Floats) -> float:
    """Macro-F1 of weighted windows. `sklearn.metrics.f1_score` checks its input for longer than it computes."""
    hit, size = y == predicted, int(max(y.max(), predicted.max())) + 1
    hits = np.bincount(y[hit], weights[hit], size)
    occurring = np.bincount(y, weights, size) + np.bincount(predicted, weights, size)
    return float(mean_f1(torch.from_numpy(hits), torch.from_numpy(occurring)))


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


def fading_mean(values: Floats, factor: float = FADING) -> Floats:
    r"""Fading mean at each window t: :math:`\sum_i f^{t-i}c_i/\sum_i f^{t-i}` over the scored windows.

    Gama, Sebastião, Rodrigues, 2013, *On evaluating stream learning algorithms*, Machine Learning 90.

    Args:
        values: c, ``[n]``, NaN for windows that are not scored. The mean is NaN before the first scored window.
        factor: f.

    >>> fading_mean(np.array([1.0, 0.0]), 0.5).round(3).tolist()
    [1.0, 0.333]
    """
    scored = ~np.isnan(values)
    filters = [1.0], [1.0, -factor]
    total = scipy.signal.lfilter(*filters, np.where(scored, values, 0.0))
    weight = scipy.signal.lfilter(*filters, scored.astype(float))
    return np.asarray(total / np.where(weight > 0, weight, np.nan))


def worst_decile(values: Sequence[float], higher_is_better: bool = True) -> float:
    """Mean over the worst tenth of the users, at least one user.

    >>> worst_decile([0.9, 0.2, 0.7]), worst_decile([0.9, 0.2, 0.7], higher_is_better=False)
    (0.2, 0.9)
    """
    ordered = sorted(values, reverse=not higher_is_better)
    return float(np.mean(ordered[: max(1, len(ordered) // 10)]))


def harm_limits(unadapted: ArrayLike, is_share: bool = True) -> Floats:
    """Loss of each user above which it is harmed (`HARM`).

    Args:
        unadapted: values of the metric for the source model.
        is_share: whether the metric is a number from 0 to 1.

    >>> harm_limits([2.0], is_share=False).round(6).tolist()
    [0.02]
    """
    values = np.asarray(unadapted, float)
    return (np.full_like(values, HARM) if is_share else HARM * np.abs(values)) + 1e-12


def harmed(
    values: Sequence[float], unadapted: Sequence[float], higher_is_better: bool = True, is_share: bool = True
) -> float:
    """Share of users whose metric is worse than the source's by more than `harm_limits`; both in the same order.

    >>> harmed([0.90, 0.70], [0.905, 0.80])
    0.5
    >>> harmed([3.0, 2.0, 1.99], [2.0, 2.0, 2.0], higher_is_better=False, is_share=False)
    0.3333333333333333
    """
    adapted, source = np.asarray(values), np.asarray(unadapted)
    loss = source - adapted if higher_is_better else adapted - source
    return float(np.mean(loss > harm_limits(source, is_share)))


def regret(traces: Sequence[Trace], unadapted: Sequence[Trace], oracle: Sequence[Trace]) -> float:
    r"""Excess errors over the oracle, relative to the source: 0 oracle, 1 source, above 1 harmful.

    :math:`\sum(\ell-\ell_{oracle})/\sum(\ell_{source}-\ell_{oracle})` over all users' windows, with the zero-one loss
    for predicted classes, else with the traces' values; NaN if the oracle is no better than the source.

    Raises:
        ValueError: the traces belong to different streams.
    """
    rule, base, best = (np.nanmean(_table(t, traces)) for t in (traces, unadapted, oracle))
    return float((best - rule) / (best - base)) if best > base else math.nan


def windows_to_close(
    share: float, traces: Sequence[Trace], unadapted: Sequence[Trace], oracle: Sequence[Trace]
) -> int | None:
    """Windows until ``share`` of the gap between source and oracle is closed for `SMOOTH` windows.

    Values are means over the users and the last `SMOOTH` windows, all three on the same windows.

    Returns:
        Number of windows (at least `SMOOTH`); None if the gap is not closed within the streams (censored), or if there
        is no gap.

    Raises:
        ValueError: the traces belong to different streams.
    """
    rule, base, best = (_moving(_table(t, traces)) for t in (traces, unadapted, oracle))
    if len(rule) < SMOOTH or not np.nanmean(best) > np.nanmean(base):
        return None
    closed = (rule >= base + share * (best - base) - 1e-12).astype(int)
    runs = np.convolve(closed, np.ones(SMOOTH, int), "valid")
    first = np.flatnonzero(runs == SMOOTH)
    return int(first[0]) + SMOOTH if len(first) else None


def _moving(values: Floats) -> Floats:
    """Moving average over users and the last `SMOOTH` windows, ``[windows - SMOOTH + 1]``."""
    ones = np.ones(SMOOTH)
    total = np.convolve(np.nansum(values, 0), ones, "valid")
    count = np.convolve((~np.isnan(values)).sum(0), ones, "valid")
    return np.asarray(total / np.maximum(count, 1))


def _table(traces: Sequence[Trace], reference: Sequence[Trace]) -> Floats:
    """``[users, windows]`` values of windows, negative where lower is better; NaN where nothing is scored."""
    if [t.digest for t in traces] != [t.digest for t in reference]:
        raise ValueError("traces of different streams cannot be compared")
    out = np.full((len(traces), max(map(len, traces))), np.nan)
    for row, trace in zip(out, traces, strict=True):
        row[: len(trace)] = trace.values if trace.higher_is_better else -trace.values
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
