from __future__ import annotations

import pytest
import torch

from fedbn.models.resnet20 import ResNet20
from fedbn.nn.hooks import capture_inputs


@pytest.mark.parametrize("side", [8, 28, 32, 33])
def test_resnet20_keeps_size_in_first_stage_and_halves_it_twice(side):
    net = ResNet20((3, side, side), 10)
    shapes = {}
    layers = {name: net.get_submodule(name) for name in ("bn1", "layer1", "layer2", "layer3", "fc")}
    with capture_inputs(layers, lambda name, value: shapes.update({name: tuple(value.shape[1:])})):
        net(torch.zeros(2, 3, side, side))
    half = -(-side // 2)
    expected = {"bn1": (16, side, side), "layer1": (16, side, side), "layer2": (16, side, side)}
    assert shapes == expected | {"layer3": (32, half, half), "fc": (64,)}
    assert sum(p.numel() for p in net.parameters()) == 272_474
