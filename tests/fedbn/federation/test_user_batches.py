"""Batches of one user in centralized training: rows, running statistics, and equality of engines."""

from __future__ import annotations

from dataclasses import replace

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
from fedbn.tasks.classification import Classification
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.experiments.experiment import Experiment
from tests.helpers import same

PLAN = Plan(rounds=2, eval_every=1, batch_size=8, global_test=12, user_batches=True)


@pytest.fixture
def make_run(tmp_path):
    """A function that returns runs on four users, shifted and scaled per user."""

    def make(strategy="centralized", **options):
        draw = np.random.default_rng(0)
        user = np.repeat(np.arange(4), 40)
        y = np.arange(160) % 2
        x = draw.normal(size=(160, 6)) * (1 + user[:, None] / 2) + 3 * user[:, None] + y[:, None]
        np.savez(tmp_path / "own.npz", x=x, y=y, user=user)
        scenario = f"files:path={tmp_path / 'own.npz'}:test=0.5"
        return Run(scenario, strategy, model="mlp", plan=replace(PLAN, **options)).resolved()

    return make


def test_user_batches_hold_one_user_and_cover_rows_once():
    owners = torch.tensor([0] * 9 + [2] * 6 + [1] * 4)
    batches = list(user_batches(owners, 4, torch.Generator().manual_seed(0)))
    assert all(len(owners[rows].unique()) == 1 for rows in batches)
    assert sorted(torch.cat(batches).tolist()) == list(range(19))
    assert sorted(map(len, batches)) == [2, 4, 4, 4, 5]
    order = [int(owners[rows[0]]) for rows in batches]
    assert order != sorted(order), "users are shuffled"
    other = list(user_batches(owners, 4, torch.Generator().manual_seed(1)))
    assert [b.tolist() for b in other] != [b.tolist() for b in batches]


@pytest.mark.parametrize("momentum", [0.3, None])
def test_fit_with_user_batches_averages_user_statistics(momentum):
    torch.manual_seed(0)
    parts = [torch.randn(4 * (2 + u), 3) * (1 + u) + 5 * u for u in range(3)]
    owners = torch.cat([torch.full((len(p),), u) for u, p in enumerate(parts)])
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 2)).train()
    x = torch.cat(parts)
    plan = replace(PLAN, batch_size=4, lr=1e-9)
    fit(net, Examples(x, owners % 2, owners), plan, task=Classification(), seed=0, round=1, user=0, row_users=owners)
    separate = [nn.BatchNorm1d(3, momentum=momentum).train() for _ in parts]
    for rows in user_batches(owners, 4, shuffle(0, 1, 0, 0)):
        separate[int(owners[rows[0]])](x[rows])
    for name in ("running_mean", "running_var"):
        expected = torch.stack([getattr(bn, name) for bn in separate])
        torch.testing.assert_close(getattr(net[0], name), expected.mean(0))
    assert int(net[0].num_batches_tracked) == 4, "the highest number of batches of a user"


def test_user_batches_affect_centralized_only(make_run):
    for strategy, equal in (("centralized", False), ("global-naive", True)):
        with_, without = (federate(make_run(strategy, user_batches=on)).server.state for on in (True, False))
        assert same(with_, without) is equal


@pytest.mark.parametrize("engine", ["grid", "grid:stacked"])
def test_user_batches_engines_agree(make_run, engine):
    a, b = execute(make_run(), "reference"), execute(make_run(), engine)
    assert same(a.server.state, b.server.state)
    actual, expected = ([s.as_dict() for user in out.scores.values() for s in user] for out in (b, a))
    tolerance = {"abs": 0, "rel": 1e-5 if engine == "grid:stacked" else 0}
    assert all(a == pytest.approx(e, **tolerance) for a, e in zip(actual, expected, strict=True))


def test_user_batches_reject_user_with_one_row(make_run):
    ctx = build_context(make_run())
    users, first = list(ctx.population.users), ctx.population.seen[0]
    users[first] = replace(users[first], train=users[first].train.take(torch.arange(1)))
    population = replace(ctx.population, users=tuple(users))
    with pytest.raises(UserError, match=f"user {users[first].name}, who has a single training example"):
        build_context_for(ctx.run, population)
    build_context_for(make_run(user_batches=False), population)


def test_experiment_file_sets_user_batches():
    values = {"scenario": "digits8", "strategies": ["centralized"], "plan": {"user_batches": True}}
    assert Experiment.from_dict(values).resolved().run("centralized", 0).plan.user_batches
    with pytest.raises(UserError, match="user_batches"):
        Experiment.from_dict(values | {"plan": {"user_batches": "maybe"}}).resolved()
