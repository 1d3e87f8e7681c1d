"""Batches of one user where one place holds many: which rows, whose statistics, and the same in every engine."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from fedbn.config import Plan
from fedbn.data.batching import user_batches
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context, build_context_for
from fedbn.federation.training import fit, shuffle
from simulations.engines.execute import execute
from simulations.experiments.experiment import Experiment
from tests.helpers import same

PLAN = Plan(rounds=2, eval_every=1, batch_size=8, global_test=12, user_batches=True)


@pytest.fixture
def people(tmp_path):
    """A function giving runs on four people, each moved and scaled on their own."""

    def make(strategy="centralized", **options):
        draw = np.random.default_rng(0)
        user = np.repeat(np.arange(4), 40)
        y = np.arange(160) % 2
        x = draw.normal(size=(160, 6)) * (1 + user[:, None] / 2) + 3 * user[:, None] + y[:, None]
        np.savez(tmp_path / "own.npz", x=x, y=y, user=user)
        scenario = f"files:path={tmp_path / 'own.npz'}:test=0.5"
        return Run(scenario, strategy, model="mlp", plan=replace(PLAN, **options)).resolved()

    return make


def test_every_batch_is_of_one_user_and_an_epoch_meets_every_row_once():
    owners = torch.tensor([0] * 9 + [2] * 6 + [1] * 4)
    met = list(user_batches(owners, 4, torch.Generator().manual_seed(0)))
    assert all(len(owners[rows].unique()) == 1 for rows in met)
    assert sorted(torch.cat(met).tolist()) == list(range(19))
    assert sorted(map(len, met)) == [2, 4, 4, 4, 5]
    order = [int(owners[rows[0]]) for rows in met]
    assert order != sorted(order), "users come mixed"
    again = list(user_batches(owners, 4, torch.Generator().manual_seed(1)))
    assert [b.tolist() for b in again] != [b.tolist() for b in met]


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_are_the_mean_over_users_of_what_each_would_have_alone(momentum):
    torch.manual_seed(0)
    parts = [torch.randn(4 * (2 + u), 3) * (1 + u) + 5 * u for u in range(3)]
    owners = torch.cat([torch.full((len(p),), u) for u, p in enumerate(parts)])
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 2)).train()
    x = torch.cat(parts)
    plan = replace(PLAN, batch_size=4, lr=1e-9)
    fit(net, Examples(x, owners % 2, owners), plan, seed=0, round=1, user=0, owners=owners)
    alone = [nn.BatchNorm1d(3, momentum=momentum).train() for _ in parts]
    for rows in user_batches(owners, 4, shuffle(0, 1, 0, 0)):
        alone[int(owners[rows[0]])](x[rows])
    for name in ("running_mean", "running_var"):
        wanted = torch.stack([getattr(bn, name) for bn in alone])
        torch.testing.assert_close(getattr(net[0], name), wanted.mean(0))
    assert int(net[0].num_batches_tracked) == 4, "the most that one user has met"


def test_the_option_changes_the_bound_and_nothing_at_clients(people):
    with_, without = (federate(people(user_batches=on)) for on in (True, False))
    assert not same(with_.server.state, without.server.state)
    with_, without = (federate(people("global-naive", user_batches=on)) for on in (True, False))
    assert same(with_.server.state, without.server.state)


@pytest.mark.parametrize("engine", ["grid", "grid:stacked"])
def test_engines_agree(people, engine):
    a, b = execute(people(), "reference"), execute(people(), engine)
    assert same(a.server.state, b.server.state)
    found, expected = ([asdict(s) for user in out.scores.values() for s in user] for out in (b, a))
    rounding = {"abs": 0, "rel": 1e-5 if engine == "grid:stacked" else 0}
    assert all(f == pytest.approx(e, **rounding) for f, e in zip(found, expected, strict=True))


def test_a_person_with_one_row_is_refused_before_anything_runs(people):
    ctx = build_context(people())
    users, first = list(ctx.population.users), ctx.population.seen[0]
    users[first] = replace(users[first], train=users[first].train.take(torch.arange(1)))
    few = replace(ctx.population, users=tuple(users))
    with pytest.raises(UserError, match=f"user {users[first].name}, who has a single training example"):
        build_context_for(ctx.run, few)
    build_context_for(people(user_batches=False), few)


def test_a_run_file_says_it_too():
    values = {"scenario": "digits8", "strategies": ["centralized"], "plan": {"user_batches": True}}
    assert Experiment.from_dict(values).resolved().run("centralized", 0).plan.user_batches
    with pytest.raises(UserError, match="user_batches"):
        Experiment.from_dict(values | {"plan": {"user_batches": "maybe"}}).resolved()
