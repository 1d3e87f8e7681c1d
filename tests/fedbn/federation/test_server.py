from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedbn.federation.client import client_round
from fedbn.federation.cold_start import cold_starts, summarize
from fedbn.federation.loop import federate
from fedbn.federation.server import Outcome, Server, global_columns, mean_loss
from fedbn.federation.setup import build_context
from fedbn.strategies.base import Progress, Update, strategies
from fedbn_simulations.engines.execute import execute


def update(user, examples, loss):
    return Update(user, {}, examples, loss)


def test_mean_loss_weights_clients_by_examples():
    assert mean_loss([update(0, 30, 1.0), update(1, 10, 5.0)]) == (30 * 1 + 10 * 5) / 40


def advanced(ctx, examples=(10, 30)):
    """Server after a round in which clients 0 and 1 sent different entries."""
    first, _ = client_round(ctx, ctx.trainers[0], ctx.initial_server_state(), None, Progress(1, 2))
    second = {k: 2 * v + 1 for k, v in first.state.items()}
    updates = [replace(first, examples=examples[0]), replace(first, user=1, state=second, examples=examples[1])]
    server = Server(ctx.initial_server_state(), ctx.initial_server_state())
    server.advance(ctx, updates, 1)
    return server, updates


@pytest.mark.parametrize(
    ("name", "statistics", "affine"),
    [("fedbn-seeded", True, True), ("global-naive", True, False), ("silobn", False, False), ("fedbn", False, False)],
)
def test_server_remembers_sent_statistics_and_seeded_entries(name, statistics, affine, small):
    server, updates = advanced(build_context(small(name)))
    expected = {k for k in ("features.1.running_mean", "features.1.running_var") if statistics}
    expected |= {k for k in ("features.1.weight", "features.1.bias") if affine}
    if not expected:
        assert server.client_statistics == {}
        return
    assert set(server.client_statistics) == {0, 1}
    for sent in updates:
        known = server.client_statistics[sent.user]
        assert {k for k in known if k.startswith("features.1.")} == expected
        assert not any(k.startswith("features.0.") for k in known)
        assert all(known[k] is sent.state[k] for k in known)


def test_newcomer_starts_from_mean_of_seeded_affine_entries(small):
    ctx = build_context(small("fedbn-seeded"))
    server, updates = advanced(ctx)
    state = ctx.assemble(server.state, None)
    x = ctx.population.users[ctx.population.unseen[0]].train.x[:8]
    starts = cold_starts(ctx, state, summarize(ctx, server.client_statistics), x)
    key = "features.1.weight"
    mean = (updates[0].state[key].double() + updates[1].state[key].double()) / 2
    for name in ("mean", "pooled", "prior"):
        torch.testing.assert_close(starts[name][key].double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(starts["initial"][key], ctx.initial[key])
    assert any(torch.equal(starts["nearest"][key], u.state[key]) for u in updates)


@pytest.mark.parametrize("name", strategies())
def test_counters_do_not_make_models_personal(name, small):
    ctx = build_context(small(name))
    owners = {ctx.ownership.owner(k) for k, role in ctx.ownership.roles.items() if role != "counter"}
    assert ctx.ownership.personal == bool(owners - {"shared"})


def test_shared_model_is_scored_once_on_pooled_test(small):
    shared, own = (build_context(small(name)) for name in ("global-naive", "fedbn"))
    first, second, *_ = shared.population.seen
    assert global_columns(shared, first) == global_columns(own, first) == global_columns(own, second)
    assert global_columns(shared, second) == global_columns(shared, first)[1:]
    assert global_columns(own, own.population.unseen[0]) == ()


@pytest.mark.parametrize("engine", ["reference", "grid"])
def test_seconds_include_those_before_resume(engine, small):
    run = small("global-naive", rounds=1)
    state = build_context(run).initial_server_state()
    out = execute(run, engine, resume=Outcome(Server(state, state), seconds=1000.0))
    assert 1000 < out.seconds < 1100
    assert 0 < federate(run).seconds < 100
