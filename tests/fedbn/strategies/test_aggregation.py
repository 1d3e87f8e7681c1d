"""Aggregation of updates with unequal weights, compared with the definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedbn.data.population import Examples, Population, User
from fedbn.strategies.base import Progress, Update, strategy
from fedbn.strategies.fednorm import FedNorm
from fedbn.strategies.ownership import Ownership

SIZES = (3, 10, 27)
KEYS = ["a.running_mean", "a.running_var", "b.running_mean", "b.running_var"]
MEANS = {key: np.random.default_rng(len(key)).normal(size=(3, 4)) * (2 if key[0] == "a" else 5) for key in KEYS}
STATES = [{key: abs(values[i]) + 0.5 if "var" in key else values[i] for key, values in MEANS.items()} for i in range(3)]


def updates():
    states = [{key: torch.tensor(value) for key, value in state.items()} for state in STATES]
    return [Update(i, state, n, 0.0) for i, (state, n) in enumerate(zip(states, SIZES, strict=True))]


def pooled(states, weights):
    """Mean and law of total variance of each layer."""
    w = np.array(weights)[:, None] / sum(weights)
    out = {}
    for mean_key, var_key in ((KEYS[0], KEYS[1]), (KEYS[2], KEYS[3])):
        means, variances = (np.stack([s[key] for s in states]) for key in (mean_key, var_key))
        out[mean_key] = (w * means).sum(0)
        out[var_key] = (w * variances).sum(0) + (w * (means - out[mean_key]) ** 2).sum(0)
    return out


def aggregated(text, weights=SIZES, old=None):
    return strategy(text).aggregate_statistics(updates(), weights, KEYS, old or {}, Progress(1, 1))


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key].numpy(), value, rtol=1e-12, err_msg=key)


def test_global_naive_averages_means_and_variances_by_weight():
    assert_equal(aggregated("global-naive"), {k: np.average([s[k] for s in STATES], 0, SIZES) for k in KEYS})


def test_global_pooled_adds_weighted_variance_of_means():
    assert_equal(aggregated("global-pooled"), pooled(STATES, SIZES))


def test_divergence_pooled_multiplies_weights_by_divergence():
    center = pooled(STATES, SIZES)
    distances = [
        sum(
            math.sqrt(sum((s[m] - center[m]) ** 2) + sum((np.sqrt(s[v]) - np.sqrt(center[v])) ** 2))
            for m, v in ((KEYS[0], KEYS[1]), (KEYS[2], KEYS[3]))
        )
        for s in STATES
    ]
    shares = [n * math.exp(-d / np.mean(distances)) for n, d in zip(SIZES, distances, strict=True)]
    assert_equal(aggregated("divergence-pooled"), pooled(STATES, shares))


@pytest.mark.parametrize(
    ("name", "rate", "correction"), [("fbn", 0.3, 1), ("hbn", 0.01, 40 / 39), ("hbn-full", 0.2, 40 / 39)]
)
def test_server_statistics_move_by_rate_towards_pooled(name, rate, correction):
    old = {key: torch.full((4,), 2.0, dtype=torch.float64) for key in KEYS}
    target = {key: value * (correction if "var" in key else 1) for key, value in pooled(STATES, SIZES).items()}
    expected = {key: 2 + rate * (value - 2) for key, value in target.items()}
    assert_equal(aggregated(f"{name}:rate={rate}", old=old), expected)


def test_global_robust_weights_clients_equally():
    expected = pooled(STATES, (1, 1, 1))
    assert_equal(aggregated("global-robust:trim=0"), expected)
    median = aggregated("global-robust:how=median")
    np.testing.assert_allclose(median[KEYS[0]], np.median([s[KEYS[0]] for s in STATES], 0))


def test_fednorm_pools_each_group_by_weight():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double()
    table = Ownership.of(layer, FedNorm())
    rng = np.random.default_rng(0)
    states = [{k: rng.normal(size=tuple(v.shape)) ** 2 for k, v in layer.state_dict().items()} for _ in range(4)]
    sizes, groups = (3, 10, 27, 5), ("left", "right", "left", "right")
    none = Examples(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1))
    population = Population(tuple(User(str(i), g, none, none) for i, g in enumerate(groups)), (), ("a", "b"), "")
    sent = [
        Update(i, {k: torch.tensor(s[k]) for k in table.travels}, n, 0.0)
        for i, (s, n) in enumerate(zip(states, sizes, strict=True))
    ]
    out = FedNorm().group_states([sent[i] for i in (1, 0, 3, 2)], (10, 3, 5, 27), table, population, {})
    assert list(out) == ["right", "left"]
    for group, members in (("left", (0, 2)), ("right", (1, 3))):
        weights = [sizes[i] for i in members]
        w = np.array(weights)[:, None] / sum(weights)
        means, variances = (np.stack([states[i][f"1.running_{f}"] for i in members]) for f in ("mean", "var"))
        mean = (w * means).sum(0)
        expected = {key: np.average([states[i][key] for i in members], 0, weights) for key in ("1.weight", "1.bias")}
        expected |= {"1.running_mean": mean, "1.running_var": (w * (variances + (means - mean) ** 2)).sum(0)}
        assert_equal(out[group], expected)
