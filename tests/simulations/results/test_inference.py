"""The signed-rank test agrees with SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulations.results.inference import EXACT_LIMIT, signed_rank


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9).filter(lambda d: len(set(d)) > 1))
def test_signed_rank_matches_scipy_for_few_tied_differences(steps):
    differences = np.array(steps) / 7
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(np.round(differences, 12)).pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [EXACT_LIMIT, EXACT_LIMIT + 1])
def test_signed_rank_matches_scipy_around_exact_limit(n):
    differences = np.random.default_rng(n).standard_normal(n)
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(differences).pvalue, abs=1e-12)


def test_signed_rank_of_repeated_observation_is_nan():
    assert math.isnan(signed_rank(np.full(5, 0.1)))
    assert signed_rank(np.zeros(3)) == 1.0
