"""Scores against scikit-learn's."""

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
def test_macro_f1_is_scikit_learns(drawn):
    classes, pairs = drawn
    said, y = torch.tensor(pairs).T
    want = f1_score(y.numpy(), said.numpy(), average="macro", zero_division=0.0)
    assert macro_f1(said, y, classes) == pytest.approx(want, abs=1e-12)


def test_a_score_counts_classes_that_occur_or_are_predicted():
    outputs = torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 2]), 5) * 9.0
    got = score("own", "aggregated", outputs, torch.tensor([0, 1, 2, 2]))
    assert got.accuracy == 0.75
    assert got.macro_f1 == pytest.approx((2 / 3 + 0 + 1) / 3)
