"""The classifier follows the scikit-learn API, and its users are independent of each other."""

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
def test_classifier_passes_scikit_learn_checks(estimator, check):
    """No check is excluded."""
    check(estimator)


@pytest.fixture(scope="module")
def data():
    """Features, labels and groups of three users whose sensors have different offsets."""
    rng = np.random.default_rng(0)
    y = np.tile(["rest", "walk"], 90)
    groups = np.repeat([0, 1, 2], 60)
    X = rng.normal(size=(180, 4)) + 3 * (y == "walk")[:, None]
    return X + groups[:, None], y, groups


@pytest.fixture(scope="module")
def fitted(data):
    X, y, groups = data
    return PersonalizedClassifier(rule="pseudo:n0=4", rounds=10, random_state=0).fit(X, y, groups=groups)


def copy(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def test_classifier_has_the_documented_defaults():
    options = {"model": "mlp", "rule": "population:diversity=1", "strategy": "global-pooled", "random_state": None}
    assert PersonalizedClassifier().get_params() == options | {"rounds": 20, "batch_size": 32, "lr": 0.05}


def test_fit_stores_no_user_statistics(fitted, data):
    assert fitted.network_.users == []
    assert fitted.score(*data[:2]) > 0.9


def test_adapt_improves_shifted_user_only(fitted, data):
    X, y, _ = data
    shifted = X[:60] + 6
    clf = copy(fitted)
    before = (clf.predict(shifted, user="new") == y[:60]).mean()
    others = clf.predict_proba(X, user="other")
    assert clf.adapt(shifted, user="new") is clf
    assert (clf.predict(shifted, user="new") == y[:60]).mean() > before + 0.3
    np.testing.assert_array_equal(clf.predict_proba(X, user="other"), others)
    np.testing.assert_array_equal(clf.predict_proba(X), fitted.predict_proba(X))
    assert clf.network_.users == ["new"]


def test_predict_does_not_change_statistics(fitted, data):
    clf = copy(fitted)
    clf.adapt(data[0][:5], user="a")
    state = clf.network_.state("a").to_bytes()
    clf.predict(data[0], user="a")
    clf.predict_proba(data[0], user=["a", "b"] * 90)
    assert clf.network_.state("a").to_bytes() == state
    assert clf.network_.users == ["a"]


def test_predict_uses_statistics_of_each_row(fitted, data):
    X = data[0]
    clf = copy(fitted).adapt(X[:30] * 2, user="a").adapt(X[30:60] - 4, user="b")
    mixed = clf.predict_proba(X[:4], user=["a", "b", "a", "never"])
    single = [clf.predict_proba(X[i : i + 1], user=u)[0] for i, u in enumerate(["a", "b", "a", None])]
    np.testing.assert_allclose(mixed, single, atol=1e-6)


def test_adapt_row_by_row_matches_batch(fitted, data):
    X = data[0][:6]
    at_once, by_row = copy(fitted).adapt(X, user="a"), copy(fitted)
    for row in X:
        by_row.adapt(row[None], user="a")
    assert at_once.network_.state("a").to_bytes() == by_row.network_.state("a").to_bytes()


def test_fit_uses_groups_as_users(data):
    """Federated training differs from pooled training and does not depend on group names."""
    X, y, groups = data
    clf = PersonalizedClassifier(rounds=2, random_state=0)
    probabilities = clf.fit(X, y, groups=groups).predict_proba(X)
    assert not np.allclose(probabilities, copy(clf).fit(X, y).predict_proba(X))
    named = np.array(["ann", "bob", "eve"])[groups]
    np.testing.assert_array_equal(copy(clf).fit(X, y, groups=named).predict_proba(X), probabilities)


def test_fit_accepts_windows():
    X = np.random.default_rng(0).normal(size=(40, 3, 32)).astype(np.float32)
    y = np.arange(40) % 2
    clf = PersonalizedClassifier(model="har-cnn", rounds=1, random_state=0).fit(X, y)
    assert clf.adapt(X[:3], user=7).predict(X, user="7").shape == (40,)


def test_cross_validation_over_groups(data):
    X, y, groups = data
    scores = cross_val_score(PersonalizedClassifier(rounds=2, random_state=0), X, y, groups=groups, cv=GroupKFold(3))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("settings", "groups", "message"),
    [
        ({"model": "mlq"}, None, "Did you mean 'mlp'"),
        ({"rule": "pseudi"}, None, "Did you mean 'pseudo'"),
        ({"strategy": "fedbm"}, None, "Did you mean 'fedbn'"),
        ({"strategy": "silobn"}, None, "keeps statistics local to each user.*choose a strategy that shares"),
        ({"strategy": "groupnorm"}, None, "statistics"),
        ({"rounds": 0}, None, "rounds must be at least 1"),
        ({}, [0, 1], "pass one group per row"),
        ({}, np.r_[9, np.zeros(179)], "single training example"),
    ],
)
def test_fit_rejects_bad_input(data, settings, groups, message):
    X, y, _ = data
    with pytest.raises(UserError, match=message):
        PersonalizedClassifier(**settings, random_state=0).fit(X, y, groups=groups)


def test_predict_rejects_wrong_number_of_users(fitted, data):
    with pytest.raises(UserError, match="180 rows and 2 users"):
        fitted.predict(data[0], user=["a", "b"])


def test_fit_does_not_use_global_generator(data):
    X, y, _ = data
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    PersonalizedClassifier(rounds=1, random_state=0).fit(X, y)
    assert torch.equal(torch.rand(1), expected)
