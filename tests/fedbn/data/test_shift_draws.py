"""Distributions that shifts draw from, measured by the change of many users' data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedbn.data.population import Examples, Population, User
from fedbn.data.shift import shift
from tests.fedbn.helpers import rejects

USERS = 120
SCALES = torch.tensor([1.0, 10.0, 100.0])


def population(shape):
    """Users with the same data; channels have the standard deviations `SCALES` and mean 5."""
    draw = torch.Generator().manual_seed(0)
    parts = []
    for n in (40, 12):
        x = torch.randn(n, *shape, generator=draw) * SCALES.view(-1, *[1] * (len(shape) - 1)) + 5
        parts.append(Examples(x, torch.arange(n) % 2, torch.zeros(n).long()))
    users = tuple(User(f"u{i}", "d", *parts) for i in range(USERS))
    return Population(users, (USERS - 1,), ("a", "b"), "none")


SENSOR, IMAGE = population((3, 16)), population((3, 4, 4))


def scales():
    """Standard deviations of the channels as measured."""
    return SENSOR.users[0].train.x.transpose(0, 1).flatten(1).std(1)


def changed(before, text):
    """Pairs (old, new) of each user's training and test values."""
    after = shift(before, text, 0)
    return [
        [(old.x.double(), new.x.double()) for old, new in ((a.train, b.train), (a.test, b.test))]
        for a, b in zip(before.users, after.users, strict=True)
    ]


def linear_maps(before, text):
    """Slopes and intercepts ``[users, channels]`` of each channel's values; training and test must agree."""
    slopes, intercepts = [], []
    for parts in changed(before, text):
        fits = []
        for old, new in parts:
            x, y = (t.transpose(0, 1).flatten(1) for t in (old, new))
            slope = ((x - x.mean(1, True)) * (y - y.mean(1, True))).sum(1) / ((x - x.mean(1, True)) ** 2).sum(1)
            torch.testing.assert_close(
                y, slope[:, None] * x + (y - slope[:, None] * x).mean(1, True), rtol=1e-4, atol=1e-3
            )
            fits.append(torch.stack([slope, y.mean(1) - slope * x.mean(1)]))
        torch.testing.assert_close(*fits, rtol=1e-3, atol=1e-3)
        slopes.append(fits[0][0])
        intercepts.append(fits[0][1])
    return torch.stack(slopes), torch.stack(intercepts)


def assert_normal(values, sd):
    """Compare mean, standard deviation and share within one deviation with those of N(0, sd), to four errors."""
    n = values.numel()
    assert float(values.mean()) == pytest.approx(0, abs=4 * sd / n**0.5)
    assert float(values.std()) == pytest.approx(sd, rel=3 / n**0.5)
    assert float((values.abs() < sd).double().mean()) == pytest.approx(0.683, abs=2 / n**0.5)


def assert_uniform(values, high):
    """Compare range, mean and variance with those of a uniform distribution on [0, high]."""
    n = len(values)
    assert 0 <= min(values) <= max(values) <= high * 1.05
    assert np.mean(values) == pytest.approx(high / 2, abs=4 * high / 12**0.5 / n**0.5)
    assert np.std(values) == pytest.approx(high / 12**0.5, rel=3 / n**0.5)


def correlation(a, b):
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def assert_independent(values):
    """Values ``[users, channels]`` of neighboring users and channels are uncorrelated."""
    assert abs(correlation(values[:-1], values[1:])) < 0.25
    assert abs(correlation(values[:, :-1], values[:, 1:])) < 0.25


def test_gain_is_log_normal_per_user_and_channel():
    slope, intercept = linear_maps(SENSOR, "gain:strength=0.4")
    assert_normal(slope.log(), 0.4)
    assert_independent(slope.log())
    assert intercept.abs().max() < 0.01


def test_offset_is_normal_in_standard_deviations():
    slope, intercept = linear_maps(SENSOR, "offset:strength=0.4")
    assert_normal(intercept / scales(), 0.4)
    assert_independent(intercept / scales())
    assert slope == pytest.approx(torch.ones_like(slope), abs=1e-4)


def test_combined_shifts_are_applied_in_order_and_drawn_independently():
    slope, intercept = linear_maps(SENSOR, "gain:strength=0.4,offset:strength=0.4")
    reverse = linear_maps(SENSOR, "offset:strength=0.4,gain:strength=0.4")
    torch.testing.assert_close(reverse[0], slope, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reverse[1], intercept * slope, rtol=1e-2, atol=1e-2)
    assert_normal(intercept / scales(), 0.4)
    assert abs(correlation(slope.log(), intercept / scales())) < 0.2


def test_noise_levels_are_uniform_and_noise_is_white():
    levels, first = [], []
    for parts in changed(SENSOR, "noise:strength=0.5"):
        noise = [((new - old) / scales()[:, None]).flatten(1) for old, new in parts]
        level = [float(part.std()) for part in noise]
        assert level[0] == pytest.approx(level[1], rel=0.15), "training and test data have the same level"
        levels.append(level[0])
        first.append(torch.cat(noise)[:, :16] / level[0])
    assert_uniform(levels, 0.5)
    assert_normal(torch.stack(first), 1.0)
    assert abs(correlation(torch.stack(first[:-1]), torch.stack(first[1:]))) < 0.05, "users have different noise"
    assert abs(correlation(torch.stack(first)[:, :12], torch.stack(first)[:, 40:])) < 0.05, "test noise differs"


def rotations(text):
    """Matrices ``[users, 3, 3]`` that map old to new triples; training and test must agree."""
    out = []
    for parts in changed(SENSOR, text):
        fits = [torch.linalg.lstsq(*(t.transpose(1, 2).flatten(0, 1) for t in pair)).solution.T for pair in parts]
        torch.testing.assert_close(*fits, rtol=1e-3, atol=1e-3)
        out.append(fits[0])
    return torch.stack(out)


def test_rotation_has_normal_angle_and_random_axis():
    matrix = rotations("rotation:strength=0.5")
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3).expand_as(matrix).double(), rtol=0, atol=1e-4)
    assert (torch.linalg.det(matrix) > 0).all()
    angle = torch.acos((matrix.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2)
    assert float((angle**2).mean().sqrt()) == pytest.approx(0.5, rel=3 / USERS**0.5)
    skew = torch.stack(
        [matrix[:, 2, 1] - matrix[:, 1, 2], matrix[:, 0, 2] - matrix[:, 2, 0], matrix[:, 1, 0] - matrix[:, 0, 1]]
    )
    axis = skew / skew.norm(dim=0)  # times the sign of the angle, which is random too
    assert axis.mean(1).abs().max() < 4 / (3 * USERS) ** 0.5
    assert (axis @ axis.T / USERS) == pytest.approx(torch.eye(3).double() / 3, abs=0.15)


def test_placement_combines_rotation_gain_and_offset():
    gains, offsets, angles = [], [], []
    for (old, new), _ in changed(SENSOR, "placement:strength=0.6"):
        x, y = (t.transpose(1, 2).flatten(0, 1) for t in (old, new))
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), y).solution
        gains.append(solution[:3].norm(dim=0))
        offsets.append(solution[3] / scales())
        rotation = (solution[:3] / gains[-1]).T
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3).double(), rtol=0, atol=1e-3)
        angles.append(torch.acos((rotation.trace() - 1) / 2))
    assert_normal(torch.stack(gains).log(), 0.2)
    assert_normal(torch.stack(offsets), 0.2)
    assert float((torch.stack(angles) ** 2).mean().sqrt()) == pytest.approx(0.6, rel=3 / USERS**0.5)
    assert abs(correlation(torch.stack(gains).log(), torch.stack(offsets))) < 0.2


def test_contrast_is_lowered_by_half_normal_exponent():
    slope, intercept = linear_maps(IMAGE, "contrast:strength=0.7")
    assert slope.max() <= 1
    assert slope.min() > 0
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), rtol=1e-4, atol=1e-5)
    exponent = -slope[:, 0].log()
    assert float(exponent.mean()) == pytest.approx(0.7 * math.sqrt(2 / math.pi), rel=0.2)
    assert float((exponent**2).mean().sqrt()) == pytest.approx(0.7, rel=3 / USERS**0.5)
    assert abs(correlation(exponent[:-1], exponent[1:])) < 0.3
    assert intercept.abs().max() < 0.01


@pytest.mark.parametrize("strength", [0.25, 0.75])
def test_inversion_affects_share_of_users(strength):
    slope, _ = linear_maps(IMAGE, f"inversion:strength={strength}")
    assert set(slope.round(decimals=4).flatten().tolist()) == {-1.0, 1.0}
    assert float((slope[:, 0] < 0).double().mean()) == pytest.approx(strength, abs=0.12)


def test_color_mixes_channels_by_identity_plus_noise():
    mixes = []
    for pairs in changed(IMAGE, "color:strength=0.3"):
        fits = [torch.linalg.lstsq(*(t.transpose(1, 3).flatten(0, 2) for t in pair)).solution.T for pair in pairs]
        torch.testing.assert_close(*fits, rtol=1e-2, atol=1e-2)
        mixes.append(fits[0] - torch.eye(3))
    noise = torch.stack(mixes)
    assert_normal(noise, 0.3)
    assert abs(correlation(noise[:, 0, 1:], noise[:, 1:, 0])) < 0.25, "the matrix is not symmetric"
    assert_independent(noise.flatten(1))


def test_blur_widths_are_uniform():
    x = torch.zeros(2, 1, 15, 15)
    x[:, 0, 7, 7] = 1
    data = Examples(x, torch.arange(2), torch.zeros(2).long())
    points = Population(tuple(User(f"u{i}", "d", data, data) for i in range(USERS)), (), ("a", "b"), "none")
    position, widths = torch.arange(15.0).double() - 7, []
    for (_, image), _ in changed(points, "blur:strength=1.5"):
        assert float(image[0].sum()) == pytest.approx(1, abs=1e-5), "blur keeps the mean"
        rows, columns = image[0, 0].sum(1), image[0, 0].sum(0)
        torch.testing.assert_close(rows, columns, rtol=1e-4, atol=1e-6)
        widths.append(math.sqrt(float((rows * position**2).sum())))
    # A kernel of three pixels is narrower than a Gaussian of less than half a pixel.
    wide = [w for w in widths if w > 0.5]
    assert_uniform([1.5 * (w - 0.5) for w in wide], 1.5)
    assert len(wide) / USERS == pytest.approx(2 / 3, abs=0.15)


def test_shift_of_a_user_is_the_same_in_training_and_test_data():
    same = Examples(*(torch.cat([t, t]) for t in vars(SENSOR.users[0].train).values()))
    before = Population((User("u", "d", same, same),), (), ("a", "b"), "none")
    for text in ("gain", "offset", "rotation", "placement"):
        (user,) = shift(before, text, 0).users
        assert torch.equal(user.train.x, user.test.x), text


def test_shift_rejects_repeated_shifts():
    # Both would draw the same numbers.
    rejects("'gain' is given twice: use one with a larger strength", shift, SENSOR, "gain,offset,gain:strength=0.1", 0)
