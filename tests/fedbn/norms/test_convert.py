"""One call converts to every kind there is; what layers have in common survives the way there and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.models.small_cnn import SmallCNN
from fedbn.nn.conversion import convert, kinds
from fedbn.nn.roles import Role, norm_layers, roles, statistics_layers
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import all_moments, recalibrate, set_statistics, statistics_of

OPTIONS = {"bne": {"domains": 2}}
AS_BN = {"evalnorm": {"size": 1e12}, "iabn": {"k": float("inf")}}  # evaluates as BN does
OWN = [
    "batch",
    "batch-renorm",
    "bne",
    "dbn",
    "dual-bn",
    "evalnorm",
    "feature-norm",
    "fedwon",
    "full-norm",
    "ghost-bn",
    "group",
    "iabn",
    "iew",
    "instance",
    "layer",
    "none",
    "weight-norm",
    "weight-standardization",
]
KEEPS = ("batch", "batch-renorm", "dbn", "evalnorm", "full-norm", "ghost-bn", "iabn", "iew")


def network(seed=0):
    torch.manual_seed(seed)
    net = SmallCNN((1, 8, 8), 10).double()
    with torch.no_grad():
        for layer in norm_layers(net).values():
            layer.weight.uniform_(0.5, 2)
            layer.bias.uniform_(-1, 1)
    for i in range(3):
        net(data(i) * 2 + 1)
    return net


def data(seed=0, n=12):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_kind_is_found():
    assert set(OWN) <= set(kinds())


@pytest.mark.parametrize("kind", OWN)
def test_a_converted_model_trains_and_evaluates_in_its_own_dtype(kind):
    net = convert(network(), kind, **OPTIONS.get(kind, {})).train()
    out = net(data())
    F.cross_entropy(out, torch.arange(12) % 10).backward()
    assert out.dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in net.state_dict().values() if t.is_floating_point())
    assert torch.isfinite(net.eval()(data(1))).all()
    assert not any(a.training for a in net.modules())


@pytest.mark.parametrize("kind", KEEPS)
def test_statistics_scale_and_shift_survive_there_and_back(kind):
    plain, x = network().eval(), data(5)
    net = convert(copy.deepcopy(plain), kind, **AS_BN.get(kind, {}))
    assert not any(layer.training for layer in net.modules())
    tolerance = 1e-4 if kind == "dbn" else 1e-9  # there epsilon is added to the standard deviation
    torch.testing.assert_close(net(x), plain(x), rtol=tolerance, atol=tolerance)
    assert set(plain.state_dict()) <= set(net.state_dict())
    back = convert(net, "batch").state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("kind", [*KEEPS, "bne", "dual-bn"])
def test_every_layer_with_statistics_is_one_for_roles_recalibration_and_writing(kind):
    net = convert(network(), kind, **(OPTIONS | AS_BN).get(kind, {}))
    plain, x = network(), data(5, 40) * 3
    recalibrate(net, x)
    recalibrate(plain, x)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    table = roles(net)
    told = statistics_of(net)
    assert set(told) == {k for k, r in table.items() if r is Role.STATISTICS}
    for path, layer in statistics_layers(net).items():
        if path not in all_moments(net, x):
            assert kind == "dual-bn"
            continue
        set_statistics(layer, Moments.from_variance(1e15, torch.full((layer.num_features,), 2.0), torch.full((), 9.0)))
        probe = torch.full((4, layer.num_features, 2, 1), 5.0, dtype=torch.float64)
        out = layer.eval()(probe)[0, :, 0, 0]
        torch.testing.assert_close(out, layer.weight + layer.bias, rtol=1e-4, atol=1e-4)  # (5 - 2) / 3


def test_momentum_and_eps_are_those_of_the_layer_replaced():
    net = nn.Sequential(nn.BatchNorm1d(3, eps=0.5, momentum=0.7, affine=False))
    for kind in ("batch", "ghost-bn", "evalnorm", "iabn"):
        layer = convert(copy.deepcopy(net), kind)[0]
        assert (layer.eps, layer.momentum, layer.weight) == (0.5, 0.7, None)
    assert convert(copy.deepcopy(net), "batch-renorm")[0].momentum == 0.01  # its own


@pytest.mark.parametrize("kind", [*KEEPS, "bne"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2), (6, 3, 2, 2, 2)])
def test_layers_take_any_number_of_position_axes_with_and_without_affine(kind, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for affine in (True, False):
        net = convert(nn.Sequential(nn.BatchNorm1d(3, affine=affine)), kind, **OPTIONS.get(kind, {}))
        for mode in (True, False):
            out = net.train(mode)(x)
            assert out.shape == x.shape
            assert out.dtype == x.dtype


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.BatchNorm1d(3)
    net = convert(nn.Sequential(shared, nn.Linear(3, 3), shared), "ghost-bn")
    assert net[0] is net[2]


def test_errors_name_the_fix():
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(UserError, match="unknown kind of normalization 'goup'. Did you mean 'group'?"):
        convert(net, "goup")
    with pytest.raises(UserError, match="unknown option of 'group' 'group'. Did you mean 'groups'?"):
        convert(net, "group", group=2)
    with pytest.raises(UserError, match="'none' has no options, so 'groups' cannot be set"):
        convert(net, "none", groups=2)
    with pytest.raises(UserError, match="conversion to ghost-bn needs normalization layers and Linear has none"):
        convert(nn.Linear(2, 2), "ghost-bn")
