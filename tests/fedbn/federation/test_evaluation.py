"""Scores compared with scikit-learn and with their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fedbn.federation.metrics import score, scores
from fedbn.federation.server import mean_loss
from fedbn.strategies.base import Update
from fedbn.tasks.classification import Classification
from tests import oracles
from tests.helpers import federated


@given(
    st.integers(1, 6).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.tuples(*2 * [st.integers(0, c - 1)]), min_size=1))
    )
)
def test_macro_f1_equals_scikit_learn(drawn):
    classes, pairs = drawn
    predicted, y = torch.tensor(pairs).T
    expected = f1_score(y.numpy(), predicted.numpy(), average="macro", zero_division=0.0)
    outputs = torch.nn.functional.one_hot(predicted, classes).float()
    assert Classification().scores(outputs, y)["macro_f1"] == pytest.approx(expected, abs=1e-12)


def test_score_macro_f1_ignores_absent_classes():
    outputs = torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 2]), 5) * 9.0
    result = score(Classification(), "own", "aggregated", outputs, torch.tensor([0, 1, 2, 2]))
    assert result.metrics["accuracy"] == 0.75
    assert result.metrics["macro_f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_scores_match_definitions():
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 12, 4, generator=draw, dtype=torch.float64) * 2
    y, n = torch.randint(0, 4, (3, 12), generator=draw), [12, 7, 2]
    users = scores(Classification(), ["own", "own", "unseen"], "online", outputs, y, n)
    for logits, labels, rows, user in zip(outputs, y, n, users, strict=True):
        expected = oracles.scores(logits[:rows], labels[:rows])
        one = score(Classification(), user.row, "online", logits[:rows], labels[:rows])
        assert (user.n, user.column, one.n) == (rows, "online", rows)
        for actual in (user, one):
            assert [actual.metrics[name] for name in ("accuracy", "macro_f1", "loss")] == pytest.approx(
                expected, rel=1e-12
            )


def test_mean_metric_and_loss_match_definitions(small):
    ctx, out = federated(small("fedbn", rounds=1))
    point = out.curve[-1]
    for users, row, value in ((ctx.population.seen, "own", point.own), (ctx.population.unseen, "unseen", point.unseen)):
        own = [
            next(s.metrics["accuracy"] for s in out.scores[u] if (s.row, s.column) == (row, "aggregated"))
            for u in users
        ]
        assert value == pytest.approx(oracles.mean(own, [1] * len(own)), rel=1e-12)
    updates = [Update(0, {}, 3, 1.5), Update(1, {}, 1, 0.5)]
    assert mean_loss(updates) == 1.25
