"""Checks of data, model and settings before training starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.data.population import Examples, Population, User, hold_out
from fedbn.data.splits import carve_validation
from fedbn.errors import UserError
from fedbn.federation.checks import check_population
from fedbn.federation.setup import build_context, load_population
from fedbn.tasks.classification import Classification
from tests.unequal import Unequal


def examples(n=12, classes=3, shape=(4,)):
    draw = torch.Generator().manual_seed(0)
    return Examples(torch.randn(n, *shape, generator=draw), torch.arange(n) % classes, torch.zeros(n).long())


def make_population(train=None, test=None, classes=("a", "b", "c")):
    first = User("u0", "d", examples() if train is None else train, examples() if test is None else test)
    others = (User(f"u{i}", "d", examples(), examples()) for i in (1, 2))
    return Population((first, *others), (2,), classes, "none")


@pytest.mark.parametrize(
    ("population", "message"),
    [
        (make_population(train=examples(0)), "user u0 has no training data: leave the user out"),
        (make_population(test=examples(0)), "user u0 has no test data"),
        (make_population(classes=("a", "b")), "labels run from 0 to 2, but there are 2 classes, 0 to 1"),
        (make_population(test=examples(shape=(5,))), r"test examples have shape \[5\], others \[4\]"),
    ],
)
def test_check_population_rejects_bad_data(population, message):
    with pytest.raises(UserError, match=message):
        check_population(population, Classification())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_population_rejects_nonfinite_values(bad):
    data = examples()
    data.x[7, 2] = bad
    message = r"1 of 12 training examples hold NaN or Inf \(first: row 7\); remove or impute"
    with pytest.raises(UserError, match=message):
        check_population(make_population(train=data), Classification())


def test_check_population_accepts_good_data():
    assert check_population(make_population(), Classification()) == []


def test_check_population_reports_classes_that_nobody_trains():
    (notice,) = check_population(make_population(classes=("a", "b", "c", "d")), Classification())
    assert notice.startswith("no seen user has training data of class d, so it is never predicted")
    single = replace(make_population(train=examples(classes=1)), unseen=(1, 2))
    with pytest.raises(UserError, match="no seen user has training data of class b, c"):
        check_population(single, Classification())


def test_build_context_rejects_too_many_clients_per_round(small):
    with pytest.raises(UserError, match=r"--clients-per-round 50 exceeds the \d seen users; choose at most \d"):
        build_context(small(clients_per_round=50))
    assert build_context(small("centralized", clients_per_round=50)).trainers == (-1,)


def test_build_context_rejects_batch_norm_with_batch_size_1(small):
    with pytest.raises(UserError, match=r"cannot train on batches of one \(--batch-size 1\): use a batch size of 2"):
        build_context(small("fedbn", model="mlp", batch_size=1))
    assert build_context(small("groupnorm", model="mlp", batch_size=1)).notices == ()
    assert any("batches of one" in n for n in build_context(small("fedbn", batch_size=1)).notices)


def test_build_context_notices_users_with_less_than_a_batch(small):
    (notice,) = build_context(small("fedbn", batch_size=500)).notices
    assert "fewer training examples than a batch of 500" in notice
    assert "they train on one smaller batch per epoch" in notice
    assert build_context(small("fedbn", batch_size=8)).notices == ()


def test_build_context_rejects_model_of_wrong_shape(small, register_model):
    text = register_model(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(9, classes)))
    with pytest.raises(UserError, match=r"does not take examples of shape \[1, 8, 8\]"):
        build_context(small("nonorm", model=text))
    text = register_model(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))
    with pytest.raises(UserError, match=r"outputs of shape \[7\] for 10 classes"):
        build_context(small("nonorm", model=text, rounds=3))
    with pytest.raises(UserError, match="returned a int, not a torch.nn.Module"):
        build_context(small("nonorm", model=register_model(lambda: 3), rounds=4))


def test_instancenorm_rejects_layers_without_positions(small):
    with pytest.raises(UserError, match="after a linear layer; choose groupnorm or layernorm"):
        build_context(small("instancenorm", model="mlp"))


def test_strategies_reject_model_without_norm_layers(small, register_model):
    text = register_model(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, classes)))
    with pytest.raises(UserError, match="'groupnorm' replaces layers with batch statistics and Sequential has none"):
        build_context(small("groupnorm", model=text))
    with pytest.raises(UserError, match="strategy 'silobn' works on running statistics"):
        build_context(small("silobn", model=text))


def test_carve_validation_rejects_too_few_rows():
    user = User("tiny", "d", examples(3), examples(3))
    with pytest.raises(UserError, match=r"user tiny has too few examples \(3\) to hold any out"):
        carve_validation(user)


def test_carve_validation_splits_few_rows_of_every_class_at_one_place():
    data = Examples(torch.arange(11.0)[:, None], torch.arange(11) % 4, torch.zeros(11, dtype=torch.long))
    split = carve_validation(User("u", "d", data, data))
    assert split.train.x.flatten().tolist() == list(range(8))
    assert split.test.x.flatten().tolist() == [9, 10]


def test_carve_validation_leaves_gap_between_parts():
    data = Examples(torch.arange(40.0)[:, None], torch.arange(40) // 20, torch.zeros(40).long())
    split = carve_validation(User("u", "d", data, data))
    train, test = (set(p.x.flatten().tolist()) for p in (split.train, split.test))
    assert not train & test
    assert not {v + 1 for v in train} & test
    assert test == {16.0, 17.0, 18.0, 19.0, 36.0, 37.0, 38.0, 39.0}


def test_validation_split_matches_definition(small_with_recordings):
    full, split = (build_context(small_with_recordings(validation=v)).population for v in (False, True))
    assert not split.unseen
    for i, user in zip(full.seen, split.users, strict=True):
        data, train, test = full.users[i].train, [], []
        groups = list(zip(data.recording.tolist(), data.y.tolist(), strict=True))
        for group in set(groups):
            rows = [row for row, g in enumerate(groups) if g == group]
            held_out = len(rows) // 5
            is_split = held_out >= 1 and len(rows) >= held_out + 2
            train += rows[: -held_out - 1] if is_split else rows
            test += rows[-held_out:] if is_split else []
        assert torch.equal(user.train.x, data.x[sorted(train)])
        assert torch.equal(user.test.x, data.x[sorted(test)])


def test_pooled_test_draws_equally_many_rows_of_every_user(small):
    for rows, expected in ((60, 7), (90, 11), (200, 25), (4, 1)):
        ctx = build_context(small(global_test=rows))
        own = [ctx.population.users[i].test.x for i in ctx.population.seen]
        counts = [sum(bool((x == row).all()) for row in ctx.pooled_test.x for x in rows_of) for rows_of in own]
        assert len(ctx.pooled_test) == sum(counts)
        sizes = [min(len(x), expected) for x in own]
        assert counts == sizes if rows >= len(own) else sorted(counts) == [0] * 4 + [1] * 4


def test_hold_out_rejects_all_users():
    with pytest.raises(UserError, match="5 unseen of 5 users leaves no user for training; choose 0 to 4"):
        hold_out(5, 5, 0)


def test_population_is_loaded_once_for_all_strategies(small, monkeypatch):
    calls, load = [], Unequal.load
    monkeypatch.setattr(Unequal, "load", lambda self, seed: calls.append(seed) or load(self, seed))
    load_population.cache_clear()
    for name in ("fedbn", "silobn", "groupnorm"):
        build_context(small(name, seed=11))
    assert calls == [11]
