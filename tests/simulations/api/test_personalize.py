"""A trained network of a result that follows new users, with a rule that is named or chosen by the seen users."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedbn
from fedbn.errors import UserError
from fedbn.online import population_prior
from fedbn_simulations.adaptation.check import Decision, number_of_cells
from fedbn_simulations.adaptation.following import source_of

USERS, ROWS = 5, 24


def population():
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(ROWS) % 3, USERS)
    x = rng.normal(size=(USERS * ROWS, 4)).astype(np.float32)
    x[np.arange(len(y)), y] += 3
    user = np.repeat([f"u{i}" for i in range(USERS)], ROWS)
    return fedbn.Population.from_arrays(x, y, user=user, unseen=["u4"])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    options = {"model": "mlp", "seeds": 1, "rounds": 2, "batch_size": 8, "progress": False}
    return fedbn.compare(population(), ["fedavg", "local"], out=tmp_path_factory.mktemp("result"), **options)


def test_personalize_follows_users_with_the_priors_of_seen_users(result):
    bank = result.personalize("fedavg", "population:diversity=1")
    model, users = result.model("fedavg"), population().users
    prior = population_prior(model, [u.train.x for u in users if u.name != "u4"])
    expected = fedbn.personalize(model, "population:diversity=1", prior)
    x = torch.randn(6, 4)
    for _ in range(3):
        assert torch.equal(bank(x, user=["ann"] * 6), expected(x, user=["ann"] * 6))
    assert not torch.equal(bank(x, user=["ann"] * 6), model(x))


def test_personalize_uses_the_rule_that_seen_users_choose(result, monkeypatch):
    decision = result.choose_rule("fedavg")
    assert decision.users == 4
    assert decision.gains
    cells = list((result.directory / "cells").glob("*.json"))
    assert len(cells) == number_of_cells(source_of(*result._finished("fedavg", None))) > 0
    chosen = Decision("population:diversity=1", "", (), 4)
    monkeypatch.setattr("fedbn_simulations.adaptation.following.decide_stored", lambda source, out: chosen)
    assert result.personalize("fedavg").bank.rule.name == "population"


def test_federation_result_chooses_without_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = fedbn.federate(population(), "fedavg", model="mlp", rounds=1, batch_size=8)
    assert found.personalize().users == []
    assert found.choose_rule().users == 4
    assert not list(tmp_path.rglob("cells"))


@pytest.mark.parametrize(
    ("strategy", "rule", "message"),
    [
        ("local", "auto", "shares no model"),
        ("fedavg", "populaton", "Did you mean 'population'"),
        ("fedavg", "pseudo/adwin/decay", "leave out what follows '/'"),
        ("fedavg", "rotation", "rotation"),
        ("fedbn", "auto", "strategy of this comparison"),
    ],
)
def test_personalize_refuses_what_cannot_follow(result, strategy, rule, message):
    with pytest.raises(UserError, match=message):
        result.personalize(strategy, rule)
