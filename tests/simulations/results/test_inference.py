"""Intervals and tests, compared with SciPy and with their definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedbn_simulations.results.inference import (
    EXACT_LIMIT,
    adjust,
    crossed_interval,
    detectable,
    estimate,
    mean_of_users,
    seed_interval,
    signed_rank,
    user_interval,
    worst_of_users,
)


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9).filter(lambda d: len(set(d)) > 1))
def test_signed_rank_matches_scipy_for_few_tied_differences(steps):
    differences = np.array(steps) / 7
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(np.round(differences, 12)).pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [EXACT_LIMIT, EXACT_LIMIT + 1])
def test_signed_rank_matches_scipy_around_exact_limit(n):
    differences = np.random.default_rng(n).standard_normal(n)
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(differences).pvalue, abs=1e-12)


@settings(max_examples=30)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8).filter(lambda d: len(set(d)) > 1))
def test_signed_rank_matches_enumeration_of_signs(steps):
    size = [abs(s) for s in steps]
    ranks = [(1 + sum(0 < o < s for o in size) + sum(0 < o <= s for o in size)) / 2 if s else 0 for s in size]
    sums = [sum(s * r for s, r in zip(signs, ranks, strict=True)) for signs in product((-1, 1), repeat=len(ranks))]
    observed = sum(math.copysign(r, s) for s, r in zip(steps, ranks, strict=True))
    expected = sum(abs(s) >= abs(observed) for s in sums) / len(sums)
    assert signed_rank(np.array(steps) / 7) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [6, 20])
def test_signed_rank_treats_rounding_errors_as_ties(n):
    steps = np.array([1, 1, -1, 2, -2, 3, 3, 3, -1, 1] * 2)[:n]
    exact = steps / 10
    noisy = exact + 1e-15 * np.random.default_rng(0).standard_normal(n)
    assert len(np.unique(np.abs(noisy))) == n
    assert signed_rank(noisy) == signed_rank(exact)
    assert signed_rank(noisy) == pytest.approx(stats.wilcoxon(steps).pvalue, abs=1e-12)
    assert math.isnan(signed_rank(np.array([0.1 + 0.2, 0.3, 0.3]))), "the same difference for every user"
    assert signed_rank(np.array([1e-15, -2e-15, 0])) == 1


def test_signed_rank_of_repeated_observation_is_nan():
    assert math.isnan(signed_rank(np.full(5, 0.1)))
    assert signed_rank(np.zeros(3)) == 1.0


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=1, max_size=8))
def test_adjust_matches_definition(p):
    known = sorted(x for x in p if not math.isnan(x))
    for x, adjusted in zip(p, adjust(pd.Series(p)), strict=True):
        bounds = [y * len(known) / (i + 1) for i, y in enumerate(known) if y >= x]
        assert adjusted == pytest.approx(min([1.0, *bounds]) if bounds else math.nan, nan_ok=True)


def test_seed_interval_matches_definition():
    values = np.array([0.3, 0.9, 0.5, 0.4])
    center = sum(values) / 4
    sd = math.sqrt(sum((v - center) ** 2 for v in values) / 3)
    actual, (low, high) = seed_interval(values)
    half = 3.182446305 * sd / 2  # 97.5 % quantile of Student's t with three degrees of freedom
    assert (actual, low, high) == pytest.approx((sd, center - half, center + half), rel=1e-8)
    assert math.isnan(seed_interval(values[:1])[0])


def test_user_interval_matches_all_resamples_of_users():
    values = np.array([[0.1, 0.3], [0.45, np.nan], [0.5, 0.6], [0.9, 0.7], [0.2, 0.95]])
    users = np.nanmean(values, axis=1)
    means = [users[list(index)].mean() for index in product(range(5), repeat=5)]
    expected = np.quantile(means, [0.025, 0.975])
    assert user_interval(mean_of_users, values) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("users", [3, 19, 20, 31])
def test_worst_and_mean_of_users_match_definitions(users):
    values = np.random.default_rng(users).random((users, 3))
    values[1, 0] = values[2, 1] = np.nan
    by_user = [[v for v in row if not math.isnan(v)] for row in values.tolist()]
    assert mean_of_users(values) == pytest.approx(sum(sum(v) / len(v) for v in by_user) / users)
    worst = []
    for column in values.T.tolist():
        low = sorted(v for v in column if not math.isnan(v))
        count = max(1, len(low) // 10)
        worst.append(sum(low[:count]) / count)
    assert worst_of_users(values) == pytest.approx(sum(worst) / 3)


def test_crossed_interval_covers_users_and_seeds():
    draw = np.random.default_rng(0)
    for of_user, of_seed in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        values = of_user * draw.standard_normal((40, 1)) + of_seed * draw.standard_normal((1, 30))
        low, high = crossed_interval(values)
        width = 2 * 1.96 * math.sqrt(of_user**2 * values.mean(1).var() / 40 + of_seed**2 * values.mean(0).var() / 30)
        assert high - low == pytest.approx(width, rel=0.15)
        assert low < values.mean() < high


def test_crossed_interval_skips_missing_values():
    values = np.random.default_rng(1).standard_normal((30, 6))
    values[:15, :3] = values[15:, 3:] = np.nan
    low, high = crossed_interval(values)
    assert -1 < low < np.nanmean(values) < high < 1
    assert np.isnan(crossed_interval(values[:1])).all()
    assert np.isnan(crossed_interval(values[:, :1])).all()


def test_detectable_effect_is_found_with_stated_power():
    draw = np.random.default_rng(0)
    sample = draw.standard_normal(12)
    sample = (sample - sample.mean()) / sample.std(ddof=1)
    effect = detectable(sample)
    assert detectable(3 * sample + 7) == pytest.approx(3 * effect)
    p = stats.ttest_1samp(draw.standard_normal((4000, 12)) + effect, 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.02)
    assert math.isnan(detectable(sample[:1]))


def test_user_interval_of_means_equals_that_of_resampled_users_and_seeds():
    values = np.random.default_rng(3).normal(size=(9, 3))
    values[[0, 4], [1, 2]] = np.nan
    assert user_interval(mean_of_users, values) == user_interval(lambda v: mean_of_users(v), values)


def test_user_interval_of_difference_resamples_users_of_both_samples():
    x, y = np.random.default_rng(4).normal(size=(2, 23, 3))
    x[2, 1] = y[2, 1] = np.nan
    both = np.concatenate([x, y], axis=1)
    expected = user_interval(lambda v: worst_of_users(v[..., :3]) - worst_of_users(v[..., 3:]), both)
    assert user_interval(worst_of_users, x, y) == expected
    assert estimate(worst_of_users, x, y).users == expected
