"""Distributions that partitions draw from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbn.data.partition import (
    Dirichlet,
    Exponential,
    Grouped,
    Iid,
    Linear,
    Pathological,
    Rows,
    Shard,
    Size,
    Square,
    matching_test_rows,
    repartition,
)
from fedbn.data.population import Examples, Population, User
from fedbn.seeds import numpy_generator

pytestmark = pytest.mark.slow


def rows(classes, per_class, users=6):
    """Rows sorted by user; labels independent of the user."""
    n = classes * per_class
    labels = np.random.default_rng(0).permutation(np.arange(n) % classes)
    return Rows(labels, np.sort(np.arange(n) % users))


def label_shares(data, parts):
    """Share ``[classes, clients]`` of each class that each client holds."""
    counts = np.stack([np.bincount(data.label[i], minlength=data.label.max() + 1) for i in parts], axis=1)
    return counts / counts.sum(1, keepdims=True)


@pytest.mark.parametrize("split", [Dirichlet.split, Dirichlet._split_all])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_moments_of_distribution(split, alpha):
    data, k = rows(300, 40), 8
    share = label_shares(data, split(Dirichlet(alpha=alpha, clients=k), data, 0))
    assert share.mean(0) == pytest.approx(np.full(k, 1 / k), abs=0.06)
    assert (share**2).sum(1).mean() == pytest.approx((alpha + 1) / (k * alpha + 1), rel=0.08)
    # Shares of two clients are negatively correlated only because they sum to one.
    off_diagonal = np.corrcoef(share.T)[~np.eye(k, dtype=bool)]
    assert off_diagonal.mean() == pytest.approx(-1 / (k - 1), abs=0.02)


def test_dirichlet_draws_classes_independently():
    data = rows(300, 40)
    share = label_shares(data, Dirichlet(alpha=0.5, clients=8).split(data, 0))
    assert abs(np.corrcoef(share[:-1].ravel(), share[1:].ravel())[0, 1]) < 0.1


def test_dirichlet_does_not_balance_sizes():
    data, alpha, k = rows(10, 30), 0.1, 5
    parts = [Dirichlet(alpha=alpha, clients=k, least=1).split(data, seed) for seed in range(30)]
    squares = [sum(len(rows) ** 2 for rows in clients) for clients in parts]
    within, between = 10 * 30**2 * (alpha + 1) / (k * alpha + 1), 90 * 30**2 / k  # pairs of rows of one or two classes
    assert np.mean(squares) == pytest.approx(within + between, rel=0.05)


def test_dirichlet_gives_every_client_the_least_number_of_rows():
    data = rows(3, 100)
    sizes = [len(i) for i in Dirichlet(alpha=0.05, clients=10, least=12).split(data, 0)]
    assert min(sizes) == 12
    assert sum(sizes) == 300


def test_shard_gives_each_client_random_blocks_of_sorted_rows():
    data = rows(5, 60)
    parts = Shard(shards=3, clients=20).split(data, 0)
    order = numpy_generator(0, "partition", "shard").permutation(300)
    position = np.empty(300, int)
    position[order[np.argsort(data.label[order], kind="stable")]] = np.arange(300)
    blocks = [sorted(set(position[i] // 5)) for i in parts]
    assert [len(i) for i in parts] == [15] * 20
    assert sorted(b for client in blocks for b in client) == list(range(60)), "every block has one client"
    assert {len(b) for b in blocks} == {3}
    neighbors = sum(b + 1 in client for client in blocks for b in client)
    assert neighbors < 15, "blocks of a client are drawn at random"


def test_pathological_gives_each_client_as_many_classes_in_equal_parts():
    data = rows(6, 40)
    share = label_shares(data, Pathological(classes=2, clients=15).split(data, 0))
    assert ((share > 0).sum(0) == 2).all()
    holders = (share > 0).sum(1, keepdims=True)
    assert np.abs(share - (share > 0) / holders).max() <= 1 / 40
    second = [tuple(np.flatnonzero(s)) for s in share.T]
    assert len(set(second)) > 6, "the second class is drawn at random"


@pytest.mark.parametrize(
    ("scheme", "weights"),
    [
        (Linear(clients=5), [1, 2, 3, 4, 5]),
        (Square(clients=5), [1, 4, 9, 16, 25]),
        (Exponential(clients=5), np.exp(range(1, 6))),
        (Size(sizes=(10, 90, 40)), None),
        (Iid(clients=7), [1] * 7),
    ],
)
def test_quantity_schemes_draw_random_rows(scheme, weights):
    data = rows(4, 300)
    parts = scheme.split(data, 0)
    sizes = np.array([len(i) for i in parts])
    if weights is None:
        assert sizes.tolist() == [10, 90, 40]
    else:
        assert sizes.sum() == 1200
        assert np.abs(sizes - 1200 * np.array(weights) / np.sum(weights)).max() < len(sizes)
    assert len(np.unique(np.concatenate(parts))) == sizes.sum(), "no row has two clients"
    for part in parts:  # rows at random: positions, labels and source users have the means of all rows
        spread = 4 / len(part) ** 0.5
        assert part.mean() == pytest.approx(599.5, abs=spread * 346)
        assert data.label[part].mean() == pytest.approx(1.5, abs=spread * 1.12)
        assert data.user[part].mean() == pytest.approx(2.5, abs=spread * 1.71)
    assert any((np.sort(a) != np.sort(b)).any() for a, b in zip(parts, scheme.split(data, 1), strict=True))


def test_grouped_merges_whole_users_in_random_order():
    data, together = rows(3, 40, users=6), set()
    for seed in range(10):
        parts = Grouped(size=2).split(data, seed)
        groups = [frozenset(data.user[i].tolist()) for i in parts]
        assert [len(g) for g in groups] == [2, 2, 2]
        assert sum(map(len, parts)) == 120
        together |= set(groups)
    assert len(together) == 15, "in ten seeds every pair of users occurs"


def test_repartition_keeps_recordings_of_different_users_apart():
    def examples(user, part):
        n = 1200
        return Examples(torch.full((n, 1), user), torch.arange(n) % 2, part * n + torch.arange(n))

    users = tuple(User(f"u{i}", "d", examples(i, 0), examples(i, 1)) for i in range(3))
    after = repartition(Population(users, (), ("a", "b"), "none"), "iid:clients=2", 0)
    owners = {}
    for client in after.users:
        for part, data in enumerate((client.train, client.test)):
            assert (data.recording.diff() >= 0).all(), "rows stay in the order of recording"
            for user, recording in zip(data.x[:, 0].tolist(), data.recording.tolist(), strict=True):
                assert owners.setdefault(recording, (user, part)) == (user, part)
    assert len(owners) == 3 * 2400


def test_matching_test_rows_are_proportional_in_every_class():
    draw = np.random.default_rng(0)
    train, test = draw.integers(0, 3, 900), draw.integers(0, 3, 200)
    parts = np.split(draw.permutation(900), [300, 420, 880])
    matched = matching_test_rows(train, parts, test, 3, 0)
    assert sorted(np.concatenate(matched).tolist()) == list(range(200)), "every test row has one client"
    for k in range(3):
        own = np.array([(train[part] == k).sum() for part in parts])
        expected = own / own.sum() * (test == k).sum()
        assert np.abs([(test[part] == k).sum() for part in matched] - expected).max() < 1
    positions = [np.flatnonzero(test == 0).searchsorted(part[test[part] == 0]).mean() for part in matched[:3]]
    assert np.abs(np.array(positions) / (test == 0).sum() - 0.5).max() < 0.25, "rows are drawn at random"
