from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbn.data import partition
from fedbn.data.partition import Dirichlet, Rows, digest, matching_test_rows, partitions, repartition
from fedbn.data.population import Examples, Population, User
from fedbn.plugins import parse
from fedbn.scenarios.base import scenario
from tests.fedbn.helpers import rejects

TEXTS = {
    "grouped": "grouped:size=3",
    "size": "size:sizes=50+100+200",
    "exponential": "exponential:clients=4",
    "dirichlet": "dirichlet:alpha=0.3:clients=8",
    "pathological": "pathological:classes=2:clients=10",
}


def population():
    return scenario("digits8").load(0)


@pytest.mark.parametrize("name", [n for n in partitions() if n != "natural"])
def test_repartition_uses_rows_once_and_separates_test_rows(name):
    text, before = TEXTS.get(name, f"{name}:clients=8"), population()
    after = repartition(before, text, 0)
    seen = [before.users[i] for i in before.seen]
    clients = [after.users[i] for i in after.seen]

    def ids(parts):
        return sorted(hash(tuple(row)) for p in parts for row in p.x.flatten(1).tolist())

    train, pooled = ids([u.train for u in clients]), ids([u.train for u in seen])
    if name in ("size", "shard"):
        assert len(train) <= len(pooled)
        assert set(train) <= set(pooled)
    else:
        assert train == pooled
    assert set(ids([u.test for u in clients])) <= set(ids([u.test for u in seen]))
    assert [u.name for u in after.users[-2:]] == [before.users[i].name for i in before.unseen]
    assert repartition(population(), text, 0).sources == after.sources
    assert after.sources["partition"] != repartition(population(), text, 1).sources["partition"]
    assert text.split(":")[0] in after.skew


@pytest.mark.parametrize(
    ("users", "size", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [3, 3]), (7, 1, [1] * 7), (7, 7, [7]), (5, 4, [3, 2])]
)
def test_grouped_merges_whole_users_if_size_does_not_divide(users, size, sizes):
    owner = np.repeat(np.arange(users), np.arange(2, users + 2))
    groups = partitions()["grouped"](size=size).split(Rows(np.zeros(len(owner)), owner), 0)
    members = [np.unique(owner[rows]).tolist() for rows in groups]
    assert [len(m) for m in members] == sizes
    assert sorted(user for group in members for user in group) == list(range(users))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(owner))), "users stay whole"


@pytest.mark.parametrize("text", ["dirichlet:alpha=1:clients=5", "pathological:classes=2:clients=5", "shard:clients=5"])
def test_clients_get_rows_from_all_over_the_file(text):
    """Rows that are neighbors in the file, which often have the same user, have different clients."""
    users = np.repeat(np.arange(10), 60)
    data = Rows(np.arange(600) % 5, users)
    for part in parse(text, "partition", partitions()).split(data, 0):
        assert np.bincount(users[part], minlength=10).max() < len(part) / 4


def test_natural_partition_changes_nothing():
    before = population()
    assert repartition(before, "natural", 0) is before
    assert repartition(before, "", 0) is before


def test_iid_gives_every_client_every_class():
    users = (User("a", "d", *(Examples(torch.randn(400, 3), torch.arange(400) // 40, torch.zeros(400).long()),) * 2),)
    after = repartition(Population(users, (), tuple("0123456789"), "none"), "iid:clients=4", 0)
    assert all(len(u.train.y.unique()) == 10 for u in after.users)


def test_repartition_matches_label_distribution_of_training():
    after = repartition(population(), "dirichlet:alpha=0.2:clients=6", 0)
    for user in after.users[:6]:
        train = torch.bincount(user.train.y, minlength=10) / len(user.train)
        test = torch.bincount(user.test.y, minlength=10) / len(user.test)
        assert float((train - test).abs().sum()) < 0.35


@settings(max_examples=25)
@given(st.integers(2, 400), st.floats(0.01, 10), st.integers(0, 5))
def test_dirichlet_split_all_never_fails(clients, alpha, seed):
    labels = np.arange(3000) % 7
    parts = Dirichlet(alpha=alpha, clients=clients, least=5)._split_all(Rows(labels, labels), seed)
    assert len(parts) == clients
    assert min(map(len, parts)) >= 5
    assert sorted(np.concatenate(parts).tolist()) == list(range(3000))


def test_dirichlet_supports_many_clients_and_small_alpha():
    labels = np.arange(20_000) % 10
    for clients, alpha in ((1000, 0.1), (50, 0.01)):
        assert len(Dirichlet(alpha=alpha, clients=clients).split(Rows(labels, labels), 0)) == clients


@given(st.lists(st.floats(0, 5), min_size=1, max_size=9).filter(lambda p: sum(p) > 0.1), st.integers(0, 500))
def test_shares_sum_to_total_with_error_below_one(proportions, total):
    p = np.array(proportions)
    counts = partition.shares(p, total)
    assert counts.sum() == total
    assert (np.abs(counts - p / p.sum() * total) < 1).all()


def test_matching_test_rows_gives_small_client_one_row():
    train = np.array([0] * 99 + [1])
    parts = matching_test_rows(train, [np.arange(98), np.array([98]), np.array([99])], np.zeros(3, int), 2, 0)
    assert [len(p) for p in parts][1:] == [1, 1]


def test_digest_differs_between_partitions():
    a = [np.array([1, 2]), np.array([3])]
    assert digest(a) == digest([np.array([1, 2]), np.array([3])])
    assert digest(a) != digest([np.array([1]), np.array([2, 3])])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dirichlet:alpha=0", "alpha must be positive"),
        ("dirichlet:clients=500", r"500 clients with at least 10 rows need 5000, but there are \d+: use fewer clients"),
        ("iid:clients=100000", "100000 clients of"),
        ("iid:clients=0", "0 clients of"),
        ("pathological:classes=11", "classes=11 per client is impossible; choose 1 to 10"),
        ("pathological:classes=1:clients=3", "cannot cover all 10 classes"),
        ("shard:shards=900", "18000 shards of"),
        ("size", r"sizes=\(none\) must be positive"),
        ("size:sizes=10+0", "must be positive"),
        ("grouped:size=99", "size=99 users per client is impossible"),
        ("exponential:clients=20", "exponential:clients=20 is impossible for"),
        ("size:sizes=1+100", "leaves client 0 with 1 training rows of"),
        ("dirichlett", r"unknown partition 'dirichlett'. Did you mean 'dirichlet'\?"),
    ],
)
def test_repartition_rejects_bad_input(text, message):
    rejects(message, repartition, population(), text, 0)


def test_parse_partition_is_canonical():
    assert partition.parse_partition("size:sizes=1+2") == "size:sizes=1+2"
    assert partition.parse_partition("iid:clients=20") == "iid"
