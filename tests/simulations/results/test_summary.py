from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from fedbn_simulations.results.inference import ALPHA
from fedbn_simulations.results.summary import is_clear


def line(low, high, p, seed_low=math.nan, seed_high=math.nan):
    return SimpleNamespace(ci_low=low, ci_high=high, p_adjusted=p, seed_low=seed_low, seed_high=seed_high)


@pytest.mark.parametrize(
    ("of", "clear"),
    [
        (line(0.1, 0.3, 0.01), True),
        (line(-0.3, -0.1, 0.01), True),
        (line(-0.1, 0.3, 0.01), False),
        (line(0.0, 0.3, 0.01), False),
        (line(0.1, 0.3, ALPHA), False),
        (line(0.1, 0.3, 0.9), False),
        # There is no p-value for the worst users and for a shared model: the interval decides.
        (line(0.1, 0.3, math.nan), True),
        (line(-0.1, 0.3, math.nan), False),
        # Without an interval over users, the one over seeds decides.
        (line(math.nan, math.nan, math.nan, 0.1, 0.2), True),
        (line(math.nan, math.nan, math.nan, -0.1, 0.2), False),
        (line(math.nan, math.nan, math.nan), False),
        (line(-0.1, 0.3, math.nan, 0.1, 0.2), False),
    ],
)
def test_is_clear_requires_interval_and_small_p_value_if_defined(of, clear):
    assert is_clear(of) is clear
