"""Statistics over users and seeds: estimates with intervals, paired tests, corrections.

The *user* is the unit of inference: users are resampled with all their seeds (a cluster bootstrap). The variation over
seeds shows how much of a mean is due to initialization and sampling; it has its own interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

LEVEL = 0.95
ALPHA = 0.05
"""A difference is clear if its interval excludes 0 and its corrected p-value is below this."""
MIN_USERS = 6
"""With fewer users, no outcome of the signed-rank test has a p-value below `ALPHA`: the smallest is 2 / 2^users."""
POWER = 0.8
"""Probability with which `detectable` finds an effect."""
RESAMPLES = 2000
MAX_VALUES = 4_000_000
"""Number of values of all resamples that fit into memory at once, which they do not with thousands of users."""
EXACT_LIMIT = 13
"""Up to this many differences the test enumerates all signs; `scipy.stats.wilcoxon` has the same limit."""

Statistic = Callable[..., np.ndarray]


class Interval(NamedTuple):
    """Lower and upper end; NaN if the data do not allow an interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; False for a missing interval."""
        return self.low > 0 or self.high < 0


NO_INTERVAL = Interval(math.nan, math.nan)


def mean_of_users(values: np.ndarray) -> np.ndarray:
    """Mean over users of each user's mean over seeds.

    Args:
        values: ``[..., users, seeds]``, NaN where a user was not evaluated in a seed; no user all NaN.

    >>> float(mean_of_users(np.array([[0.5, 0.7], [0.8, np.nan]])))
    0.7
    """
    return np.nanmean(values, axis=-1).mean(axis=-1)


def worst_of_users(values: np.ndarray) -> np.ndarray:
    """Mean over seeds of each seed's lowest tenth of users (rounded down, at least one).

    Args:
        values: ``[..., users, seeds]``, NaN where a user was not evaluated in a seed.

    >>> float(worst_of_users(np.array([[0.5, 0.7], [0.8, 0.3]])))
    0.4
    """
    present = (~np.isnan(values)).sum(axis=-2, keepdims=True)
    count = np.minimum(np.maximum(1, present // 10), present)
    ordered = np.sort(values, axis=-2)[..., : count.max(), :]  # NaN is sorted to the end
    selected = np.arange(ordered.shape[-2])[:, None] < count
    total = np.where(selected, ordered, 0.0).sum(axis=-2)
    size = count[..., 0, :]
    return np.nanmean(np.where(size > 0, total / np.maximum(size, 1), np.nan), axis=-1)


def highest_of_users(values: np.ndarray) -> np.ndarray:
    """The same for a metric of which lower values are better: mean over seeds of each seed's highest tenth of users.

    >>> float(highest_of_users(np.array([[0.5, 0.7], [0.8, 0.3]])))
    0.75
    """
    return -worst_of_users(-values)


def uniform(values: np.ndarray) -> bool:
    """Whether ``[users, seeds]`` hold one observation per seed, repeated for several users.

    This happens if all users share one model and one test set. If users take part in different seeds, their means
    differ although the users do not.

    >>> uniform(np.array([[0.8, 0.7], [0.8, np.nan]])), uniform(np.array([[0.8, np.nan], [np.nan, 0.7]]))
    (True, False)
    """
    present = (~np.isnan(values)).sum(axis=0)
    value_range = np.nanmax(values, axis=0) - np.nanmin(values, axis=0)
    return bool((present > 1).any() and (value_range < 1e-12).all())


def user_interval(statistic: Statistic, *samples: np.ndarray) -> Interval:
    """Percentile bootstrap interval of a statistic, or of its difference between two samples.

    Users are resampled with all their seeds. The interval is NaN for a single user and for users that do not differ.

    Args:
        statistic: maps arrays ``[..., users, seeds]`` to ``[...]``.
        samples: one or two, ``[users, seeds]`` each, the same users in the same order.
    """
    users = len(samples[0])
    if users < 2 or all(uniform(values) or np.ptp(np.nanmean(values, axis=1)) < 1e-12 for values in samples):
        return NO_INTERVAL
    return _percentiles(_difference([_resampled(statistic, sample) for sample in samples]))


def _difference(values: Sequence[np.ndarray]) -> np.ndarray:
    """The first values minus the second, if any."""
    first, *second = values
    return first - second[0] if second else first


def _resampled(statistic: Statistic, values: np.ndarray) -> np.ndarray:
    """The statistic of all resamples of the users."""
    users, seeds = values.shape
    if statistic is not mean_of_users:
        return _resampled_once(statistic, values.tobytes(), users, seeds, RESAMPLES)
    # A mean over users only needs each user's mean, which is many times faster than all its seeds in every resample.
    means = np.nanmean(values, axis=1)
    return np.concatenate([means[index].mean(axis=1) for index in _resamples(users, seeds, RESAMPLES)])


@lru_cache(maxsize=256)
def _resampled_once(statistic: Statistic, data: bytes, users: int, seeds: int, number: int) -> np.ndarray:
    """Every strategy is compared with the same reference, whose resamples take longer than all the rest."""
    values = np.frombuffer(data).reshape(users, seeds)
    return np.concatenate([statistic(values[index]) for index in _resamples(users, seeds, number)])


def _resamples(users: int, seeds: int, number: int) -> Iterable[np.ndarray]:
    """Indices of the users of all resamples, ``[n, users]`` each: parts of which all values fit into memory."""
    count = max(1, MAX_VALUES // (users * seeds))
    return [_all_resamples(users, number)] if count >= number else _resampled_parts(users, number, count)


@lru_cache(maxsize=8)
def _all_resamples(users: int, number: int) -> np.ndarray:
    """The same users are drawn for every statistic, so drawing them once saves most of the time of a report."""
    return next(_resampled_parts(users, number, number))


def _resampled_parts(users: int, number: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for done in range(0, number, count):
        yield rng.integers(0, users, (min(count, number - done), users))


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def seed_interval(per_seed: np.ndarray) -> tuple[float, Interval]:
    """Standard deviation over seeds, and Student's t interval of their mean; NaN for one seed."""
    count = len(per_seed)
    if count < 2:
        return math.nan, NO_INTERVAL
    sd = float(np.std(per_seed, ddof=1))
    half = _t_quantile((1 + LEVEL) / 2, count - 1) * sd / math.sqrt(count)
    center = float(np.mean(per_seed))
    return sd, Interval(center - half, center + half)


@lru_cache(maxsize=64)
def _t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution; a call of SciPy takes longer than the rest of an interval."""
    return float(scipy.stats.t.ppf(probability, degrees))


def crossed_interval(values: np.ndarray) -> Interval:
    """Percentile interval of the mean over users, with users and seeds resampled independently of each other.

    It covers both sources of variation at once, and tends to be too wide rather than too narrow (Owen 2007, *The
    pigeonhole bootstrap*, https://arxiv.org/abs/0712.1111). With few seeds it is rough, because few can be resampled.
    NaN for fewer than two users or two seeds.

    Args:
        values: ``[users, seeds]``, NaN where a user was not evaluated in a seed.

    >>> low, high = crossed_interval(np.array([[0.1, 0.3], [0.2, 0.4], [0.3, 0.5]]))
    >>> 0.1 <= low < 0.3 < high <= 0.5
    True
    """
    users, seeds = values.shape
    if users < 2 or seeds < 2:
        return NO_INTERVAL
    present = ~np.isnan(values)
    known = np.where(present, values, 0.0)
    means: list[np.ndarray] = []
    count = max(1, MAX_VALUES // users)
    for of_user, of_seed in [_all_counts(users, seeds)] if count >= RESAMPLES else _count_parts(users, seeds, count):
        drawn = of_seed @ present.T
        user_means = np.divide(of_seed @ known.T, drawn, out=np.zeros(drawn.shape), where=drawn > 0)
        weights = of_user * (drawn > 0)
        total = weights.sum(axis=1)
        means.append((weights * user_means).sum(axis=1)[total > 0] / total[total > 0])
    return _percentiles(np.concatenate(means))


@lru_cache(maxsize=8)
def _all_counts(users: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    return next(_count_parts(users, seeds, RESAMPLES))


def _count_parts(users: int, seeds: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each user and each seed is drawn, ``[n, users]`` and ``[n, seeds]``."""
    rng = np.random.default_rng(0)
    for n in (min(count, RESAMPLES - done) for done in range(0, RESAMPLES, count)):
        yield rng.multinomial(users, np.full(users, 1 / users), n), rng.multinomial(seeds, np.full(seeds, 1 / seeds), n)


def detectable(values: np.ndarray) -> float:
    """Smallest true mean that a two-sided t test of such values finds with probability `POWER`.

    It is ``(t(0.975) + t(POWER)) s / sqrt(n)``, the usual approximation, at the 5 % level without correction for
    several comparisons; NaN for fewer than two values.

    >>> round(detectable(np.array([-1.0, 0.0, 1.0, 0.0])), 2)
    1.7
    """
    count = len(values)
    if count < 2:
        return math.nan
    quantiles = _t_quantile((1 + LEVEL) / 2, count - 1) + _t_quantile(POWER, count - 1)
    return float(quantiles * np.std(values, ddof=1) / math.sqrt(count))


def needed_count(values: np.ndarray, distance: float, limit: int = 1000) -> int | None:
    """Smallest number of values with this standard deviation for which `detectable` is at most a distance.

    None if there are fewer than two values, or if more than ``limit`` are needed.

    >>> needed_count(np.array([-1.0, 0.0, 1.0, 0.0]), 1.7), needed_count(np.array([-1.0, 0.0, 1.0, 0.0]), 0.01)
    (4, None)
    """
    if len(values) < 2 or not distance > 0:
        return None
    counts = np.arange(2, limit + 1)
    quantiles = scipy.stats.t.ppf((1 + LEVEL) / 2, counts - 1) + scipy.stats.t.ppf(POWER, counts - 1)
    enough = quantiles * np.std(values, ddof=1) / np.sqrt(counts) <= distance
    return int(counts[enough.argmax()]) if enough.any() else None


class Estimate(NamedTuple):
    """A statistic with its interval over users, and its standard deviation and interval over seeds."""

    value: float = math.nan
    users: Interval = NO_INTERVAL
    seed_sd: float = math.nan
    seeds: Interval = NO_INTERVAL
    n_users: int = 0
    n_seeds: int = 0


def estimate(statistic: Statistic, *samples: np.ndarray) -> Estimate:
    """Estimate a statistic of ``[users, seeds]``, or its difference between two samples with NaN at the same positions.

    No user is all NaN.

    >>> result = estimate(mean_of_users, np.array([[0.5, 0.7], [0.8, 0.6]]))
    >>> round(result.value, 3), round(result.seed_sd, 3), result.n_users, result.n_seeds
    (0.65, 0.0, 2, 2)
    """
    n_users, n_seeds = samples[0].shape
    present = ~np.isnan(samples[0])
    if present.all():
        per_seed = _difference([statistic(values.T[:, :, None].copy()) for values in samples])
    else:
        of_seeds = [[statistic(v[present[:, s], s : s + 1]) for s in range(n_seeds)] for v in samples]
        per_seed = _difference([np.array(values) for values in of_seeds])
    sd, seeds = seed_interval(per_seed)
    value = float(_difference([statistic(values) for values in samples]))
    return Estimate(value, user_interval(statistic, *samples), sd, seeds, n_users, n_seeds)


def signed_rank(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; 1 if all differences are 0, NaN if they are all the same.

    The same non-zero difference for every user (two shared models on one shared test set) is a single observation. A
    p-value that counts it once per user would be meaningless.

    >>> signed_rank(np.zeros(5)), signed_rank(np.array([0.3])), signed_rank(np.full(30, 0.1))
    (1.0, nan, nan)
    """
    # Rounding turns differences that only floating-point error separates into ties.
    differences = np.round(differences, 12)
    if not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return math.nan
    if len(differences) > EXACT_LIMIT:
        return float(scipy.stats.wilcoxon(differences).pvalue)
    # Same as SciPy for few and tied differences, but SciPy computes the ranks again for every choice of signs.
    nonzero = differences[differences != 0]
    ranks = scipy.stats.rankdata(np.abs(nonzero))
    sums, observed = _all_signs(len(ranks)) @ ranks, np.sign(nonzero) @ ranks  # ranks are multiples of 1/2: exact sums
    return float(min(1.0, 2 * min((sums <= observed).mean(), (sums >= observed).mean())))


@lru_cache(maxsize=16)
def _all_signs(count: int) -> np.ndarray:
    """Every choice of the signs of ``count`` numbers, ``[2^count, count]``."""
    return 1.0 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)


def adjust(p: pd.Series) -> pd.Series:
    """Benjamini-Hochberg adjusted p-values; missing ones stay missing.

    >>> adjust(pd.Series([0.01, np.nan, 0.04])).tolist()
    [0.02, nan, 0.04]
    """
    adjusted = p.astype(float).copy()
    known = adjusted.notna()
    if known.any():
        adjusted[known] = scipy.stats.false_discovery_control(adjusted[known].to_numpy())
    return adjusted
