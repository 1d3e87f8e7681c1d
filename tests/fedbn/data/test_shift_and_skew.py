from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbn.data.partition import repartition
from fedbn.data.population import Examples, Population, User
from fedbn.data.shift import parse_shift, shift, shifts
from fedbn.data.skew import measure, statistics_distance
from fedbn.scenarios.base import scenario
from fedbn.statistics.moments import Moments
from tests.fedbn.helpers import rejects

SENSORS = ["gain", "offset", "noise", "rotation", "placement"]
IMAGES = ["contrast", "inversion", "blur", "color"]


def sensors():
    """Four users with the same data."""
    x = torch.randn(30, 6, 16, generator=torch.Generator().manual_seed(0))
    data = Examples(x, torch.arange(30) % 3, torch.zeros(30).long())
    return Population(tuple(User(f"u{i}", "d", data, data) for i in range(4)), (3,), ("a", "b", "c"), "none")


def images():
    return scenario("digits8").load(0)


@pytest.mark.parametrize("name", shifts())
def test_shift_is_keyed_by_seed_and_user(name):
    before = sensors() if name in SENSORS else images()
    a, b, c = shift(before, name, 0), shift(before, name, 0), shift(before, name, 1)
    assert all(torch.equal(x.train.x, y.train.x) for x, y in zip(a.users, b.users, strict=True))
    assert any(not torch.equal(x.train.x, y.train.x) for x, y in zip(a.users, c.users, strict=True))
    fewer = Population(before.users[:2], (), before.classes, "none")
    if name not in ("offset", "noise", "placement"):  # these are in units of the population's deviation
        assert torch.equal(shift(fewer, name, 0).users[0].train.x, a.users[0].train.x)
    if name in SENSORS and name != "noise":
        assert torch.equal(a.users[0].train.x, a.users[0].test.x)
        assert not torch.equal(a.users[0].train.x, a.users[1].train.x)
    assert all(torch.isfinite(u.train.x).all() for u in a.users)
    assert name in a.skew
    unchanged = shift(before, f"{name}:strength=0", 0)
    torch.testing.assert_close(unchanged.users[0].train.x, before.users[0].train.x, rtol=1e-5, atol=1e-5)


def test_rotation_preserves_norms():
    populations = (sensors(), shift(sensors(), "rotation", 0))
    old, new = (p.users[1].train.x.unflatten(1, (2, 3)).norm(dim=2) for p in populations)
    torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-5)


def test_shift_applies_several_shifts_in_order():
    both = shift(sensors(), "gain,offset", 0)
    chained = shift(shift(sensors(), "gain", 0), "offset", 0)
    assert both.users[0].train.x.shape == chained.users[0].train.x.shape
    assert parse_shift("offset,gain:strength=0.2") == "offset,gain"
    assert shift(sensors(), "", 0).skew == "none"


@pytest.mark.parametrize(
    ("name", "message"),
    [(n, "for sensors use gain, offset") for n in IMAGES]
    + [("rotated", "unknown shift 'rotated'. Did you mean 'rotation'")],
)
def test_shift_rejects_image_shifts_for_sensors(name, message):
    rejects(message, shift, sensors(), name, 0)


def test_shift_rejects_sensor_shifts_for_images():
    rejects("for images use contrast", shift, images(), "rotation", 0)
    rejects("strength must not be negative", parse_shift, "gain:strength=-1")


def test_measure_detects_synthetic_skew():
    skew = measure(sensors())
    assert skew.label_divergence == pytest.approx(0, abs=1e-12)
    assert (skew.quantity_cv, skew.quantity_ratio) == (0, 1)
    assert skew.feature_w2 == pytest.approx(0, abs=1e-6)
    assert measure(shift(sensors(), "gain", 0)).feature_w2 > 0.05
    population = images()
    mild, strong = (measure(repartition(population, f"dirichlet:alpha={a}:clients=8", 0)) for a in (100, 0.1))
    assert mild.label_divergence < 0.05 < 0.3 < strong.label_divergence <= 1
    assert measure(repartition(population, "linear:clients=8", 0)).quantity_cv > 0.4


def test_statistics_distance_matches_moments():
    x = [torch.randn(20, 3, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]
    moments = [Moments.of(v) for v in x]
    actual = statistics_distance([m.mean.numpy() for m in moments], [m.variance().numpy() for m in moments])
    assert np.allclose(actual, [[float(a.w2(b)) for b in moments] for a in moments])
