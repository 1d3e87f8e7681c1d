from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedbn.models import build, models
from fedbn.models.resnet20 import ResNet20
from fedbn.nn.conversion import convert, groups_for
from fedbn.nn.roles import norm_layers, statistics_layers
from tests.fedbn.helpers import rejects
from tests.helpers import same

SHAPES = {"stroke-cnn": (1, 24), "har-cnn": (6, 32), "mlp": (12,)}


@given(st.integers(1, 300), st.integers(1, 64))
def test_groups_for_divides_channels(channels, limit):
    groups = groups_for(channels, groups=limit)
    assert channels % groups == 0
    assert 1 <= groups <= max(1, limit)
    assert channels % groups_for(channels, per_group=limit) == 0


def test_convert_keeps_names_and_affine_parameters():
    net = ResNet20((3, 16, 16), 10)
    with torch.no_grad():
        net.layer2[0].downsample[1].weight.fill_(3.0)
    names = {k for k in net.state_dict() if "running" not in k and "tracked" not in k}
    convert(net, "group", groups=4)
    assert set(net.state_dict()) == names
    assert not statistics_layers(net)
    assert float(net.layer2[0].downsample[1].weight.detach()[0]) == 3.0
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_group_norm_limits_are_layer_and_instance_norm():
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    layer = convert(nn.Sequential(nn.BatchNorm1d(6)), "layer")
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(x, [6, 5]))
    instance = convert(nn.Sequential(nn.BatchNorm1d(6)), "instance")
    group = convert(nn.Sequential(nn.BatchNorm1d(6)), "group", groups=6)
    torch.testing.assert_close(instance(x), group(x))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 3)])
def test_convert_back_to_batch_matches_torch(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = convert(convert(nn.Sequential(nn.BatchNorm2d(6)), "group", groups=3), "batch")
    torch.testing.assert_close(model(x), nn.functional.batch_norm(x, None, None, training=True))


def test_convert_rejects_bad_input():
    message = "needs normalization layers and Linear has none: choose a model with BatchNorm"
    rejects(message, convert, nn.Linear(2, 2), "group")
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    rejects("groups=0 is impossible; give at least 1", convert, net, "group", groups=0)
    rejects("channels=0 per group is impossible", convert, net, "group", per_group=0)
    rejects("after a linear layer; choose groupnorm or layernorm", convert(net, "instance"), torch.zeros(2, 3))
    rejects("the model itself is a normalization layer: wrap it", convert, nn.BatchNorm1d(4), "group")


@pytest.mark.parametrize("name", [n for n in models() if n not in ("resnet50-cvgj", "vgg19-cvgj")])
def test_build_is_deterministic_for_every_model(name):
    """Without the two largest networks, for their time."""
    shape = SHAPES.get(name, (1, 16, 16))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build(name, shape, 4, 0), build(name, shape, 4, 0), build(name, shape, 4, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(a.state_dict(), b.state_dict())
    assert not same(a.state_dict(), c.state_dict())
    assert norm_layers(a)
    assert a(torch.zeros(3, *shape)).shape[:2] == (3, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("har-cnn", r"har-cnn takes windows \[channels, length >= 8\]"),
        ("digit-cnn", r"digit-cnn takes images"),
        ("small-cnn", r"small-cnn takes images"),
        ("resnet20", r"resnet20 takes images"),
        ("no-such", r"unknown model \(or package.module:factory\) 'no-such'"),
        ("nowhere.at.all:make", r"cannot import 'nowhere.at.all'"),
        ("fedbn.models.mlp:MPL", r"unknown model in fedbn.models.mlp 'MPL'. Did you mean 'MLP'\?"),
    ],
)
def test_build_rejects_bad_input(name, message):
    rejects(message, build, name, (2,), 3, 0)
