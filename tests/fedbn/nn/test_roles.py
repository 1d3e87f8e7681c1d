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


def test_head_is_not_a_module_whose_path_begins_with_its_path():
    net = nn.ModuleDict({"fc2": nn.Linear(2, 2), "fc": nn.ModuleDict({"1": nn.Linear(2, 3), "0": nn.Linear(3, 2)})})
    assert head(net) == ("fc.0",)
    table = roles(net)
    assert {k for k, r in table.items() if r is Role.HEAD} == {"fc.0.weight", "fc.0.bias"}
    longer = nn.ModuleDict({"head_of_old_task": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert {k for k, r in roles(longer).items() if r is Role.HEAD} == {"head.weight", "head.bias"}


def test_parts_of_the_head_belong_to_the_head():
    net = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    heads = {k for k, r in roles(net).items() if r is Role.HEAD}
    assert heads == {k for k in net.state_dict() if k.startswith("1.")}
    assert len(heads) == 3


def test_roles_of_complex_and_integer_entries():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
            self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("mask", torch.tensor([True]))

    table = roles(nn.Sequential(Spectral(), nn.Linear(2, 2)))
    assert table["0.weight"] is table["0.phase"] is Role.BODY
    assert table["0.steps"] is table["0.mask"] is Role.COUNTER


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
