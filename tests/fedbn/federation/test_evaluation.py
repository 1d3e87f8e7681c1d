"""Scores compared with scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fedbn.federation.metrics import macro_f1, score


@given(
    st.integers(1, 6).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.tuples(*2 * [st.integers(0, c - 1)]), min_size=1))
    )
)
def test_macro_f1_equals_scikit_learn(drawn):
    classes, pairs = drawn
    predicted, y = torch.tensor(pairs).T
    expected = f1_score(y.numpy(), predicted.numpy(), average="macro", zero_division=0.0)
    assert macro_f1(predicted, y, classes) == pytest.approx(expected, abs=1e-12)


def test_score_macro_f1_ignores_absent_classes():
    outputs = torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 2]), 5) * 9.0
    result = score("own", "aggregated", outputs, torch.tensor([0, 1, 2, 2]))
    assert result.accuracy == 0.75
    assert result.macro_f1 == pytest.approx((2 / 3 + 0 + 1) / 3)
