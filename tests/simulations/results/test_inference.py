"""Tests over users are SciPy's, however few differences there are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulations.results.inference import FEW, signed_rank


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9).filter(lambda d: len(set(d)) > 1))
def test_few_and_tied_differences_give_scipys_p(steps):
    differences = np.array(steps) / 7
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(np.round(differences, 12)).pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [FEW, FEW + 1])
def test_untied_and_many_differences_too(n):
    differences = np.random.default_rng(n).standard_normal(n)
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(differences).pvalue, abs=1e-12)


def test_one_observation_in_many_places_is_no_test():
    assert math.isnan(signed_rank(np.full(5, 0.1)))
    assert signed_rank(np.zeros(3)) == 1.0
