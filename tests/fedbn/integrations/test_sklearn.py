"""The classifier behaves as scikit-learn expects, and its users do not disturb each other."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from fedbn import PersonalizedClassifier
from fedbn.errors import UserError


@pytest.mark.slow
@parametrize_with_checks([PersonalizedClassifier(rounds=10, random_state=0)])
def test_scikit_learn(estimator, check):
    """All checks apply; none is excused."""
    check(estimator)


@pytest.fixture(scope="module")
def people():
    """Three people whose sensors have an offset and a scale of their own, and labels that both depend on."""
    rng = np.random.default_rng(0)
    y = np.tile(["rest", "walk"], 90)
    groups = np.repeat([0, 1, 2], 60)
    X = rng.normal(size=(180, 4)) + 3 * (y == "walk")[:, None]
    return X + groups[:, None], y, groups


@pytest.fixture(scope="module")
def fitted(people):
    X, y, groups = people
    return PersonalizedClassifier(rule="pseudo:n0=4", rounds=10, random_state=0).fit(X, y, groups=groups)


def copied(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def test_fit_leaves_no_statistics_of_anybody(fitted, people):
    assert fitted.network_.users == []
    assert fitted.score(*people[:2]) > 0.9


def test_adapting_helps_a_shifted_user_and_touches_nobody_else(fitted, people):
    X, y, _ = people
    shifted = X[:60] + 6
    ours = copied(fitted)
    before = (ours.predict(shifted, user="new") == y[:60]).mean()
    others = ours.predict_proba(X, user="other")
    assert ours.adapt(shifted, user="new") is ours
    assert (ours.predict(shifted, user="new") == y[:60]).mean() > before + 0.3
    np.testing.assert_array_equal(ours.predict_proba(X, user="other"), others)
    np.testing.assert_array_equal(ours.predict_proba(X), fitted.predict_proba(X))
    assert ours.network_.users == ["new"]


def test_predicting_moves_nothing(fitted, people):
    ours = copied(fitted)
    ours.adapt(people[0][:5], user="a")
    state = ours.network_.state("a").to_bytes()
    ours.predict(people[0], user="a")
    ours.predict_proba(people[0], user=["a", "b"] * 90)
    assert ours.network_.state("a").to_bytes() == state
    assert ours.network_.users == ["a"]


def test_a_row_in_a_mixed_batch_is_its_users(fitted, people):
    X = people[0]
    ours = copied(fitted).adapt(X[:30] * 2, user="a").adapt(X[30:60] - 4, user="b")
    mixed = ours.predict_proba(X[:4], user=["a", "b", "a", "never"])
    alone = [ours.predict_proba(X[i : i + 1], user=u)[0] for i, u in enumerate(["a", "b", "a", None])]
    np.testing.assert_allclose(mixed, alone, atol=1e-6)


def test_adapting_row_by_row_is_adapting_at_once(fitted, people):
    X = people[0][:6]
    at_once, by_row = copied(fitted).adapt(X, user="a"), copied(fitted)
    for row in X:
        by_row.adapt(row[None], user="a")
    assert at_once.network_.state("a").to_bytes() == by_row.network_.state("a").to_bytes()


def test_groups_are_users_of_a_federation(people):
    """Federated over people is not the same as trained on one heap, and the order of groups' names is free."""
    X, y, groups = people
    make = PersonalizedClassifier(rounds=2, random_state=0)
    ours = make.fit(X, y, groups=groups).predict_proba(X)
    assert not np.allclose(ours, copied(make).fit(X, y).predict_proba(X))
    named = np.array(["ann", "bob", "eve"])[groups]
    np.testing.assert_array_equal(copied(make).fit(X, y, groups=named).predict_proba(X), ours)


def test_windows(people):
    X = np.random.default_rng(0).normal(size=(40, 3, 32)).astype(np.float32)
    y = np.arange(40) % 2
    ours = PersonalizedClassifier(model="har-cnn", rounds=1, random_state=0).fit(X, y)
    assert ours.adapt(X[:3], user=7).predict(X, user="7").shape == (40,)


def test_cross_validation_over_people(people):
    X, y, groups = people
    scores = cross_val_score(PersonalizedClassifier(rounds=2, random_state=0), X, y, groups=groups, cv=GroupKFold(3))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("settings", "groups", "said"),
    [
        ({"model": "mlq"}, None, "Did you mean 'mlp'"),
        ({"rule": "pseudi"}, None, "Did you mean 'pseudo'"),
        ({"strategy": "fedbm"}, None, "Did you mean 'fedbn'"),
        ({"strategy": "silobn"}, None, "leaves statistics with each user.*choose one that shares"),
        ({"strategy": "groupnorm"}, None, "statistics"),
        ({"rounds": 0}, None, "rounds must be at least 1"),
        ({}, [0, 1], "give one group a row"),
        ({}, np.r_[9, np.zeros(179)], "single training example"),
    ],
)
def test_what_a_user_can_get_wrong(people, settings, groups, said):
    X, y, _ = people
    with pytest.raises(UserError, match=said):
        PersonalizedClassifier(**settings, random_state=0).fit(X, y, groups=groups)


def test_one_name_a_row(fitted, people):
    with pytest.raises(UserError, match="180 rows and 2 users"):
        fitted.predict(people[0], user=["a", "b"])


def test_global_generators_are_left_alone(people):
    X, y, _ = people
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    PersonalizedClassifier(rounds=1, random_state=0).fit(X, y)
    assert torch.equal(torch.rand(1), wanted)
