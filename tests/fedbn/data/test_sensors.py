import re
from dataclasses import replace

import pytest
import torch

from fedbn.data.population import Examples, Population, User
from fedbn.data.sensors import sensor_notices


def population(change=lambda x: x):
    draw = torch.Generator().manual_seed(0)
    users = []
    for i in range(4):
        x = 0.05 * torch.randn(20, 6, 64, generator=draw)
        x[:, 0] += 1.0
        y = torch.arange(20) % 2
        part = Examples(change(x) if i == 2 else x, y, torch.zeros_like(y))
        users.append(User(f"u{i}", "", part, part))
    return Population(tuple(users), (3,), ("a", "b"), "", triples=((0, 1, 2),))


def clip(x):
    x = x.clone()
    x[:, 1] = (4 * torch.linspace(-1, 1, 64)).clamp(-2.0, 2.0)
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 9.81 * x, r"gravity of user u2 is 9\.[78]\d? times that of most users"),
        (lambda x: x / 9.81, r"gravity of user u2 is 0\.10\d? times"),
        (clip, "accelerations of user u2 are saturated"),
    ],
)
def test_another_unit_and_saturation_are_reported(change, message):
    [notice] = sensor_notices(population(change))
    assert re.search(message, notice)


def test_correct_recordings_have_no_notice():
    assert sensor_notices(population()) == []
    assert sensor_notices(replace(population(clip), triples=())) == []
    # Without gravity, the unit of an acceleration is unknown.
    assert sensor_notices(population(lambda x: 9.81 * torch.randn_like(x))) == []
