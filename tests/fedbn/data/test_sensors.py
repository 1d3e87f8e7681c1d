import re
from dataclasses import replace

import pytest
import torch

from fedbn.data.population import Examples, Population, User
from fedbn.data.sensors import sensor_limits, sensor_notices


def population(change=lambda x: x, side="train"):
    """Four users at rest; the recordings of one of them on one side are changed."""
    draw = torch.Generator().manual_seed(0)
    users = []
    for i in range(4):
        x = 0.05 * torch.randn(20, 6, 64, generator=draw)
        x[:, 0] += 1.0
        y = torch.arange(20) % 2
        parts = {part: Examples(x, y, torch.zeros_like(y)) for part in ("train", "test")}
        if i == 2:
            parts[side] = replace(parts["train"], x=change(x))
        users.append(User(f"u{i}", "", **parts))
    return Population(tuple(users), (3,), ("a", "b"), "", triples=((0, 1, 2),))


def clip(x):
    x = x.clone()
    x[:, 1] = (4 * torch.linspace(-1, 1, 64)).clamp(-2.0, 2.0)
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 9.81 * x, r"gravity of user u2 is 9\.[78]\d? times that of most users"),
        (lambda x: x / 9.81, "gravity of user u2 is 0.102 times"),
        (clip, "accelerations of user u2 are saturated"),
    ],
)
@pytest.mark.parametrize("side", ["train", "test", "stream"])
def test_another_unit_and_saturation_are_reported(change, message, side):
    [notice] = sensor_notices(population(change, side))
    assert re.search(message, notice)


def test_correct_recordings_have_no_notice():
    assert sensor_notices(population()) == []
    assert sensor_notices(replace(population(clip), triples=())) == []
    # Without gravity, the unit of an acceleration is unknown.
    assert sensor_notices(population(lambda x: 9.81 * torch.randn_like(x))) == []


def test_limits_detect_other_units_and_missing_gravity_in_a_few_windows():
    limits = sensor_limits(population())
    x = population().users[0].test.x[:2]
    assert limits.gravity == pytest.approx(1, abs=0.01)
    assert limits.problem(x) == limits.problem(2 * x) == limits.problem(x / 2) == ""
    # A device that is turned within a window measures gravity all the time, though its mean is small.
    spinning, angle = x.clone(), torch.linspace(0, 12, 64)
    spinning[:, :2] = torch.stack([angle.cos(), angle.sin()])
    assert limits.problem(spinning) == ""
    assert re.search(r"is 9\.\d+ times gravity", limits.problem(9.81 * x))
    for wrong in (x / 9.81, x - torch.eye(6)[0, :, None], torch.zeros_like(x)):
        assert "times gravity: include gravity, and use the unit of the training data" in limits.problem(wrong)
    assert limits.saturated(torch.cat([x, clip(x)])).tolist() == [False, False, True, True]
    assert sensor_limits(replace(population(), triples=())) is None
    assert sensor_limits(population(torch.randn_like)).gravity == pytest.approx(1, abs=0.01)
