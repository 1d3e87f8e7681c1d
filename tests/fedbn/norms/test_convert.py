"""Conversion to every kind of normalization and back, keeping what the layers have in common."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.nn.conversion import convert, kinds
from fedbn.nn.roles import Role, norm_layers, roles, statistics_layers
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import all_moments, recalibrate, set_statistics, statistics_of
from tests.fedbn.helpers import network as small_network
from tests.fedbn.helpers import rejects

OPTIONS = {"bne": {"domains": 2}}
BN_OPTIONS = {"evalnorm": {"size": 1e12}, "iabn": {"k": float("inf")}}  # evaluates as BN
STATISTICS_KINDS = ("batch", "batch-renorm", "dbn", "evalnorm", "full-norm", "ghost-bn", "iabn", "iew")
OTHER_KINDS = ("bne", "dual-bn", "feature-norm", "fedwon", "group", "instance", "layer", "none", "weight-norm")
KINDS = (*STATISTICS_KINDS, *OTHER_KINDS, "weight-standardization")


def network(seed=0):
    net = small_network(seed)
    with torch.no_grad():
        for layer in norm_layers(net).values():
            layer.weight.uniform_(0.5, 2)
            layer.bias.uniform_(-1, 1)
    for i in range(3):
        net(data(i) * 2 + 1)
    return net


def data(seed=0, n=12):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kinds_finds_every_module():
    assert set(KINDS) <= set(kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_convert_keeps_dtype_and_mode(kind):
    net = convert(network(), kind, **OPTIONS.get(kind, {})).train()
    out = net(data())
    F.cross_entropy(out, torch.arange(12) % 10).backward()
    assert out.dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in net.state_dict().values() if t.is_floating_point())
    assert torch.isfinite(net.eval()(data(1))).all()
    assert not any(a.training for a in net.modules())


@pytest.mark.parametrize("kind", STATISTICS_KINDS)
def test_convert_and_back_keeps_state(kind):
    plain, x = network().eval(), data(5)
    net = convert(copy.deepcopy(plain), kind, **BN_OPTIONS.get(kind, {}))
    assert not any(layer.training for layer in net.modules())
    tolerance = 1e-4 if kind == "dbn" else 1e-9  # dbn adds epsilon to the standard deviation
    torch.testing.assert_close(net(x), plain(x), rtol=tolerance, atol=tolerance)
    assert set(plain.state_dict()) <= set(net.state_dict())
    restored = convert(net, "batch").state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(restored[key], value), key


@pytest.mark.parametrize("kind", [*STATISTICS_KINDS, "bne", "dual-bn"])
def test_converted_layers_support_statistics_functions(kind):
    net = convert(network(), kind, **(OPTIONS | BN_OPTIONS).get(kind, {}))
    plain, x = network(), data(5, 40) * 3
    recalibrate(net, x)
    recalibrate(plain, x)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    table = roles(net)
    assert set(statistics_of(net)) == {k for k, r in table.items() if r is Role.STATISTICS}
    for path, layer in statistics_layers(net).items():
        if path not in all_moments(net, x):
            assert kind == "dual-bn"
            continue
        set_statistics(layer, Moments.from_variance(1e15, torch.full((layer.num_features,), 2.0), torch.full((), 9.0)))
        probe = torch.full((4, layer.num_features, 2, 1), 5.0, dtype=torch.float64)
        out = layer.eval()(probe)[0, :, 0, 0]
        torch.testing.assert_close(out, layer.weight + layer.bias, rtol=1e-4, atol=1e-4)  # (5 - 2) / 3


def test_convert_inherits_momentum_and_eps():
    net = nn.Sequential(nn.BatchNorm1d(3, eps=0.5, momentum=0.7, affine=False))
    for kind in ("batch", "ghost-bn", "evalnorm", "iabn"):
        layer = convert(copy.deepcopy(net), kind)[0]
        assert (layer.eps, layer.momentum, layer.weight) == (0.5, 0.7, None)
    assert convert(copy.deepcopy(net), "batch-renorm")[0].momentum == 0.01  # not inherited


@pytest.mark.parametrize("kind", [*STATISTICS_KINDS, "bne"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2), (6, 3, 2, 2, 2)])
def test_layers_accept_any_number_of_position_axes(kind, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for affine in (True, False):
        net = convert(nn.Sequential(nn.BatchNorm1d(3, affine=affine)), kind, **OPTIONS.get(kind, {}))
        for mode in (True, False):
            out = net.train(mode)(x)
            assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_convert_replaces_shared_layer_once():
    shared = nn.BatchNorm1d(3)
    net = convert(nn.Sequential(shared, nn.Linear(3, 3), shared), "ghost-bn")
    assert net[0] is net[2]


def test_convert_rejects_bad_input():
    net = nn.Sequential(nn.BatchNorm1d(3))
    rejects("unknown kind of normalization 'goup'. Did you mean 'group'?", convert, net, "goup")
    rejects("unknown option of 'group' 'group'. Did you mean 'groups'?", convert, net, "group", group=2)
    rejects("'none' has no options, so 'groups' cannot be set", convert, net, "none", groups=2)
    message = "conversion to ghost-bn needs normalization layers and Linear has none"
    rejects(message, convert, nn.Linear(2, 2), "ghost-bn")
