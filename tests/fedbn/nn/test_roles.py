from __future__ import annotations

import pytest
import torch
from torch import nn

from fedbn.models.resnet20 import ResNet20
from fedbn.nn.roles import Role, combine, head, roles, split, statistics_layers


def test_roles_cover_nested_network():
    table = roles(ResNet20((3, 32, 32), 10))
    assert list(table) == list(ResNet20((3, 32, 32), 10).state_dict())
    assert table["layer2.0.downsample.1.weight"] is Role.AFFINE
    assert table["layer2.0.downsample.1.running_var"] is Role.STATISTICS
    assert table["layer2.0.downsample.1.num_batches_tracked"] is Role.COUNTER
    assert table["layer2.0.downsample.0.weight"] is Role.BODY
    assert {k for k, r in table.items() if r is Role.HEAD} == {"fc.weight", "fc.bias"}


def test_roles_use_types_instead_of_names():
    class CustomNorm(nn.BatchNorm1d):
        pass

    net = nn.Sequential()
    net.add_module("bn", nn.Linear(2, 2))
    net.add_module("subnet", CustomNorm(2))
    net.add_module("out", nn.Linear(2, 2))
    table = roles(net)
    assert table["bn.weight"] is Role.BODY
    assert table["subnet.weight"] is Role.AFFINE


def test_statistics_layers_skips_bn_without_statistics():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert not statistics_layers(net)
    assert set(roles(net).values()) == {Role.HEAD, Role.AFFINE}
    assert head(nn.Sequential(nn.ReLU())) == ()


def test_combine_inverts_split_and_is_strict():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    table, state = roles(net), net.state_dict()
    left, right = split(state, {"1.running_mean", "0.weight"})
    assert list(combine(table, right, left)) == list(state)
    with pytest.raises(KeyError, match="missing"):
        combine(table, right)
    with pytest.raises(KeyError, match="duplicate"):
        combine(table, left, state)
    with pytest.raises(KeyError, match="unknown"):
        combine(table, state, {"x": torch.zeros(1)})
