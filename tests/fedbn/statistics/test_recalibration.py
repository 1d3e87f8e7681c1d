from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedbn.nn.roles import clone, statistics_layers
from fedbn.statistics import recalibration
from fedbn.statistics.consensus import flatten, replay, unflatten, union
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import agree_layerwise, layer_moments, recalibrate, set_statistics, statistics_of
from tests.fedbn.helpers import network


def data(n=60, seed=1):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def reference_statistics(model, x):
    """Reference: hooks in a plain evaluation pass and moments computed by torch."""
    inputs = {}
    for path, layer in statistics_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _m, a, path=path: inputs.__setitem__(path, a[0].transpose(0, 1).flatten(1))
        )
    with torch.no_grad():
        model.eval()(x)
    means = {f"{path}.running_mean": rows.mean(1) for path, rows in inputs.items()}
    return means | {f"{path}.running_var": rows.var(1, correction=1) for path, rows in inputs.items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-12)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_consensus_equals_recalibration_on_union(sizes):
    sizes[0] += 1
    model, x = network(), data(sum(sizes))
    parts = x.split(sizes)
    aggregates = []
    while True:
        replies = [replay(lambda p=p: agree_layerwise(copy.deepcopy(model), p), aggregates) for p in parts]
        if replies[0] is None:
            break
        aggregates.append(union(replies))
    assert len(aggregates) == 2
    for aggregate in aggregates:
        for path, moments in aggregate.items():
            set_statistics(model.get_submodule(path), moments)
    assert_equal(statistics_of(model), reference_statistics(model, x))


def test_recalibrate_is_independent_of_chunk_size(monkeypatch):
    model, x = network(), data()
    whole = clone(statistics_of(recalibrate(copy.deepcopy(model), x)))
    monkeypatch.setattr(recalibration, "CHUNK", 7)
    weights = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    actual = statistics_of(recalibrate(model, x))
    assert_equal(actual, whole)
    assert_equal(actual, reference_statistics(model, x))
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value)


def test_recalibrate_processes_layers_in_order():
    model, x = network(), data()
    second = list(statistics_layers(model))[1]
    before = layer_moments(copy.deepcopy(model), second, x)
    after = layer_moments(recalibrate(copy.deepcopy(model), x), second, x)
    assert not torch.allclose(before.mean, after.mean)


def test_replay_repeats_protocol_from_start():
    model, x = network(), data()
    steps = agree_layerwise(copy.deepcopy(model), x)
    first = next(steps)
    second = steps.send(first)
    repeated = replay(lambda: agree_layerwise(copy.deepcopy(model), x), [first])
    assert repeated is not None
    for path, moments in second.items():
        assert torch.equal(moments.mean, repeated[path].mean)
    assert replay(lambda: agree_layerwise(copy.deepcopy(model), x), [first, second]) is None


def test_unflatten_inverts_flatten():
    moments = {"a.b": Moments.of(torch.randn(5, 3)), "": Moments.of(torch.randn(4, 2))}
    restored = unflatten(flatten(moments))
    assert list(restored) == ["a.b", ""]
    assert torch.equal(restored["a.b"].m2, moments["a.b"].m2)


@pytest.mark.parametrize("net", [nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))])
def test_recalibrate_on_one_row_gives_zero_variance(net):
    recalibrate(net, torch.randn(1, 3))
    assert all(torch.isfinite(v).all() for v in net.state_dict().values())


def test_recalibrate_on_source_restores_its_statistics():
    model, source, target = network(), data(), data(seed=2) * 5 - 3
    before = clone(statistics_of(recalibrate(model, source)))
    changed = clone(statistics_of(recalibrate(model, target)))
    assert not torch.allclose(changed["features.1.running_mean"], before["features.1.running_mean"], atol=0.1)
    assert_equal(statistics_of(recalibrate(model, source)), before)


class Reversed(nn.Module):
    """Two normalization layers, registered in reverse order; the first runs ``calls`` times."""

    def __init__(self, calls=1):
        super().__init__()
        self.second, self.first, self.calls = nn.BatchNorm1d(3), nn.BatchNorm1d(3), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = torch.relu(self.first(x) + 1) * x.new_tensor([1.0, 2.0, 3.0])
        return self.second(x)


def test_recalibrate_follows_the_order_of_execution():
    torch.manual_seed(0)
    x = torch.randn(40, 3) * 2 + 5
    net = recalibrate(Reversed(), x).eval()
    exact = x - x.mean(0)
    middle = torch.relu(exact / (x.var(0) + 1e-5).sqrt() + 1) * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(net.second.running_mean, middle.mean(0))
    torch.testing.assert_close(net.second.running_var, middle.var(0))


def test_recalibrate_uses_all_inputs_of_a_layer_that_runs_twice():
    torch.manual_seed(0)
    x = torch.randn(40, 3) * 2 + 5
    untrained = Reversed(calls=2).eval()
    again = torch.relu(untrained.first(x) + 1) * torch.tensor([1.0, 2.0, 3.0])
    inputs = torch.cat([x, again]).detach()
    net = recalibrate(untrained, x)
    torch.testing.assert_close(net.first.running_mean, inputs.mean(0))
    torch.testing.assert_close(net.first.running_var, inputs.var(0))
