"""Statistics over users and seeds: estimates with intervals, paired tests, corrections.

The *user* is the unit of inference: intervals come from resampling users with all their seeds kept together (a
cluster bootstrap). Seeds say how much of a mean is luck of initialization and sampling; they get their own interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
FEW = 13
"""Most differences of which all choices of signs are tried; `scipy.stats.wilcoxon` has the same limit."""

Statistic = Callable[..., np.ndarray]


class Interval(NamedTuple):
    """Lower and upper end; NaN where the data admit none."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; False for an interval that does not exist."""
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
    """Mean of the lowest tenth of users (rounded down, at least one) of each seed, then over seeds.

    Args:
        values: ``[..., users, seeds]``, NaN where a user was not evaluated in a seed.

    >>> float(worst_of_users(np.array([[0.5, 0.7], [0.8, 0.3]])))
    0.4
    """
    ordered = np.sort(values, axis=-2)  # NaN goes last
    present = (~np.isnan(values)).sum(axis=-2, keepdims=True)
    tenth = np.minimum(np.maximum(1, present // 10), present)
    chosen = np.arange(values.shape[-2])[:, None] < tenth
    total = np.where(chosen, ordered, 0.0).sum(axis=-2)
    size = tenth[..., 0, :]
    return np.nanmean(np.where(size > 0, total / np.maximum(size, 1), np.nan), axis=-1)


def uniform(values: np.ndarray) -> bool:
    """Whether ``[users, seeds]`` hold one observation a seed, repeated for several users.

    So it is where all users hold one model and meet the same test data. Users may be in different seeds,
    and then their means differ although nothing distinguishes the users.

    >>> uniform(np.array([[0.8, 0.7], [0.8, np.nan]])), uniform(np.array([[0.8, np.nan], [np.nan, 0.7]]))
    (True, False)
    """
    present = (~np.isnan(values)).sum(axis=0)
    spread = np.nanmax(values, axis=0) - np.nanmin(values, axis=0)
    return bool((present > 1).any() and (spread < 1e-12).all())


def user_interval(statistic: Statistic, *samples: np.ndarray) -> Interval:
    """Percentile interval of a statistic when users are resampled, their seeds kept together.

    With one user, or where users do not differ at all, resampling says nothing: the interval is NaN.

    Args:
        statistic: maps arrays ``[..., users, seeds]`` to ``[...]``.
        samples: ``[users, seeds]`` each, the same users in the same order.
    """
    users = len(samples[0])
    if users < 2 or all(uniform(values) or np.ptp(np.nanmean(values, axis=1)) < 1e-12 for values in samples):
        return NO_INTERVAL

    def resampled(index: np.ndarray, axis: int) -> np.ndarray:
        del axis  # users are the last axis of the index, and so the last but one of what it takes
        return statistic(*(values[index.astype(int)] for values in samples))

    low, high = stats.bootstrap(
        (np.arange(users),),
        resampled,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        # With thousands of users all resamples at once would not fit into memory.
        batch=max(1, 4_000_000 // samples[0].size),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(low), float(high))


def seed_interval(per_seed: np.ndarray) -> tuple[float, Interval]:
    """Standard deviation over seeds, and Student's t interval of their mean; NaN for one seed."""
    count = len(per_seed)
    if count < 2:
        return math.nan, NO_INTERVAL
    sd = float(np.std(per_seed, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    center = float(np.mean(per_seed))
    return sd, Interval(center - half, center + half)


class Estimate(NamedTuple):
    """A statistic with its interval over users, and its spread and interval over seeds."""

    value: float = math.nan
    users: Interval = NO_INTERVAL
    seed_sd: float = math.nan
    seeds: Interval = NO_INTERVAL
    n_users: int = 0
    n_seeds: int = 0


def estimate(statistic: Statistic, *samples: np.ndarray) -> Estimate:
    """The statistic of ``[users, seeds]`` samples; all have NaN at the same places, no user is all NaN.

    >>> found = estimate(mean_of_users, np.array([[0.5, 0.7], [0.8, 0.6]]))
    >>> round(found.value, 3), round(found.seed_sd, 3), found.n_users, found.n_seeds
    (0.65, 0.0, 2, 2)
    """
    n_users, n_seeds = samples[0].shape
    present = ~np.isnan(samples[0])
    per_seed = np.array(
        [float(statistic(*(values[present[:, s], s : s + 1] for values in samples))) for s in range(n_seeds)]
    )
    sd, seeds = seed_interval(per_seed)
    return Estimate(float(statistic(*samples)), user_interval(statistic, *samples), sd, seeds, n_users, n_seeds)


def signed_rank(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 if nothing differs, NaN if all differ by the same.

    The same non-zero difference for every user (two shared models on one shared test set) is one
    observation, not many; a p-value that counts it once per user would be made up.

    >>> signed_rank(np.zeros(5)), signed_rank(np.array([0.3])), signed_rank(np.full(30, 0.1))
    (1.0, nan, nan)
    """
    # Rounding makes ties out of differences that only floating point tells apart.
    differences = np.round(differences, 12)
    if not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return math.nan
    if len(differences) > FEW:
        return float(stats.wilcoxon(differences).pvalue)
    # As SciPy's function does it with few and tied differences; but that ranks them anew for every choice of signs.
    ranks = np.zeros(len(differences))
    moved = differences != 0
    ranks[moved] = np.sign(differences[moved]) * stats.rankdata(np.abs(differences[moved]))
    return float(stats.permutation_test((ranks,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue)


def adjust(p: pd.Series) -> pd.Series:
    """Benjamini-Hochberg adjusted p-values over those that exist.

    >>> adjust(pd.Series([0.01, np.nan, 0.04])).tolist()
    [0.02, nan, 0.04]
    """
    adjusted = p.astype(float).copy()
    known = adjusted.notna()
    if known.any():
        adjusted[known] = stats.false_discovery_control(adjusted[known].to_numpy())
    return adjusted
