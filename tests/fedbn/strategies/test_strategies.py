"""Laws for every strategy found, and what makes each the method it is named after."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.loop import federate
from fedbn.federation.server import Server
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn.statistics.recalibration import all_moments, statistics_of
from fedbn.strategies.base import Progress, Update, strategies
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED
from fedbn.tta.adaptation_rates import RATES
from simulations.engines.execute import execute
from tests.helpers import few, same

ALL = list(strategies())
FIRST = Progress(1, 2)


trained = lru_cache(maxsize=1)(federate)


def one_round(ctx, user=None):
    user = ctx.trainers[0] if user is None else user
    return client_round(ctx, user, ctx.start(), None, FIRST)


@pytest.mark.parametrize("name", ALL)
def test_every_entry_has_one_owner_and_counters_stay_home(name, small):
    table = build_context(small(name)).ownership
    assert sorted(table.keys(SHARED, SEEDED, LOCAL)) == sorted(table.roles)
    assert all(table.owner(k) is LOCAL for k, r in table.roles.items() if r is Role.COUNTER)
    rows = table.rows()
    assert sum(r["bytes"] for r in rows) == sum(table.sizes.values())
    assert sum(r["bytes_up"] for r in rows) == sum(table.sizes[k] for k in table.travels)


@pytest.mark.parametrize("name", ALL)
def test_a_client_sends_what_travels_and_keeps_what_it_owns(name, small):
    ctx = build_context(small(name))
    update, kept = one_round(ctx)
    assert list(update.state) == ctx.ownership.travels
    assert list(kept) == ctx.ownership.retained
    fake = {k: v + 1 for k, v in ctx.start().items()}
    again = ctx.assemble(fake, kept)
    for key, value in again.items():
        expected = kept[key] if key in kept else fake[key]
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ALL)
def test_training_moves_every_trained_entry_and_leaves_the_received_state_alone(name, small):
    ctx = build_context(small(name))
    start = ctx.start()
    before = {k: v.clone() for k, v in start.items()}
    update, kept = client_round(ctx, ctx.trainers[0], start, None, FIRST)
    assert same(start, before)
    moved = update.state | kept
    if name == "atp":
        assert not moved.pop(RATES).any(), "learnt when the model is trained"
    assert all(not torch.equal(v, ctx.initial[k]) for k, v in moved.items())


@pytest.mark.parametrize("name", ALL)
def test_aggregating_equal_updates_changes_nothing(name, small):
    ctx = build_context(small(name))
    update, _ = one_round(ctx)
    # From where they are: strategies whose server follows slowly stay there too.
    server = Server(update.state, update.state)
    server.advance(ctx, [replace(update, user=u, examples=10 + u) for u in ctx.population.seen[:3]], 1)
    assert list(server.state) == ctx.ownership.travels
    for key, value in server.state.items():
        assert value.dtype == ctx.initial[key].dtype
        torch.testing.assert_close(value, update.state[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_newcomer_gets_a_complete_finite_model(name, small):
    ctx = build_context(small(name))
    state = ctx.assemble(ctx.start(), None)
    assert list(state) == list(ctx.ownership.roles)
    assert ctx.strategy.newcomer


@pytest.mark.parametrize("name", ALL)
def test_a_run_repeats_to_the_last_bit_and_depends_on_its_seed(name, small):
    a, b = (federate(small(name, rounds=1, **few(name))) for _ in range(2))
    assert same(a.server.state, b.server.state)
    assert a.scores == b.scores
    other = federate(small(name, rounds=1, **few(name), seed=1))
    assert a.curve != other.curve


@pytest.mark.parametrize("name", ALL)
def test_users_who_were_not_drawn_keep_their_state(name, small):
    if strategies()[name].is_centralized:
        pytest.skip("there is one trainer")
    run = small(name, rounds=2, clients_per_round=2, eval_every=2)
    seen = {}
    out = federate(run, on_round=lambda n, o: seen.setdefault(n, {u: dict(k) for u, k in o.client_states.items()}))
    ctx = build_context(run)
    first, second = set(ctx.sampled(1)), set(ctx.sampled(2))
    assert set(seen[1]) == first
    assert set(out.client_states) == first | second
    for user in first - second:
        assert same(seen[1][user], out.client_states[user])


OWN_STATISTICS = {
    "batch-renorm": "normalizes by a mixture of batch and running statistics",
    "ghost-bn": "normalizes parts of a batch",
    "iabn": "corrects BN by each window's own statistics",
    "fbn": "trains with the server's statistics, which follow slowly",
    "fixbn": "freezes statistics half way",
    "hbn": "trains with a mixture of global and batch statistics",
    "hbn-full": "trains with a mixture of global and batch statistics",
    "static-bn": "keeps no running statistics",
}


@pytest.mark.parametrize("name", ALL)
def test_with_one_user_every_strategy_is_training_alone(name, small):
    options = {"partition": "iid:clients=1", "rounds": 2}
    alone = trained(small("local", **options))
    ctx = build_context(small(name, **options))
    if ctx.ownership.roles.keys() != alone.client_states[ctx.population.seen[0]].keys():
        pytest.skip("another network than the bounds train")
    if name in OWN_STATISTICS:
        pytest.skip(OWN_STATISTICS[name])
    out = federate(small(name, **options))
    mine = out.server.state | next(iter(out.client_states.values()))
    for key, value in next(iter(alone.client_states.values())).items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_is_a_short_documented_file(name):
    cls = strategies()[name]
    lines = inspect.getsource(inspect.getmodule(cls)).splitlines()
    assert len(lines) < 80
    assert cls.about
    assert ">>>" in (cls.__doc__ or "")


# What each method is ------------------------------------------------------------------------------------------------


def finished(small, name, **settings):
    run = small(name, **settings)
    return build_context(run), federate(run)


def test_fedbn_users_differ_in_bn_alone(small):
    ctx, out = finished(small, "fedbn")
    a, b = (ctx.assemble(out.server.state, out.client_states[u]) for u in ctx.population.seen[:2])
    for key, role in ctx.ownership.roles.items():
        if role in (Role.AFFINE, Role.STATISTICS):
            assert not torch.equal(a[key], b[key])
        elif role is not Role.COUNTER:
            assert torch.equal(a[key], b[key])


def test_fedbn_seeded_serves_seen_users_as_fedbn_does_and_newcomers_the_mean(small):
    ctx, seeded = finished(small, "fedbn-seeded")
    _, plain = finished(small, "fedbn")
    for user in ctx.population.seen:
        assert same(seeded.client_states[user], plain.client_states[user])
        assert seeded.scores[user] == plain.scores[user]
    key = "features.1.weight"
    mean = sum(seeded.client_states[u][key].double() * len(ctx.training_data(u)) for u in ctx.population.seen)
    mean /= sum(len(ctx.training_data(u)) for u in ctx.population.seen)
    newcomer = ctx.assemble(seeded.server.state, None)
    torch.testing.assert_close(newcomer[key].double(), mean, rtol=1e-6, atol=1e-6)


def test_silobn_is_parameters_only_for_users_who_persist(small):
    _, silo = finished(small, "silobn", clients_per_round=3, rounds=3)
    _, params = finished(small, "params-only", clients_per_round=3, rounds=3)
    assert same(silo.server.state, params.server.state)
    assert silo.scores == params.scores


def test_mtfl_choices_are_the_methods_they_name(small):
    for private, name in (("us", "silobn"), ("usyb", "fedbn"), ("none", "global-naive")):
        _, a = finished(small, f"mtfl:private={private}")
        _, b = finished(small, name)
        assert same(a.server.state, b.server.state), name
        assert a.scores == b.scores, name
    ctx, _ = finished(small, "mtfl")
    assert ctx.ownership.owner("features.1.weight") is LOCAL
    assert ctx.ownership.owner("features.1.running_var") is SHARED


def test_pooled_and_naive_share_everything_but_the_variances(small):
    ctx, naive = finished(small, "global-naive")
    _, pooled = finished(small, "global-pooled")
    for key, value in naive.server.state.items():
        if key.endswith("running_var"):
            assert bool((pooled.server.state[key] >= value - 1e-6).all())
            assert bool((pooled.server.state[key] > value + 1e-4).any())
        else:
            assert torch.equal(value, pooled.server.state[key]), key
    assert ctx.ownership.roles["features.1.running_var"] is Role.STATISTICS


def test_global_recalibrated_serves_the_moments_of_the_union_under_the_final_weights(small):
    ctx, out = finished(small, "global-recalibrated")
    x = torch.cat([ctx.training_data(u).x for u in ctx.population.seen])
    model = ctx.load(ctx.assemble(out.server.serving, None))
    stored = {k: v.clone() for k, v in statistics_of(model).items()}
    for path, moments in all_moments(model, x).items():
        torch.testing.assert_close(stored[f"{path}.running_mean"].double(), moments.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            stored[f"{path}.running_var"].double(), moments.variance(unbiased=True), rtol=1e-4, atol=1e-5
        )
    assert not torch.equal(out.server.state["features.1.running_var"], out.server.serving["features.1.running_var"])


def test_centralized_is_one_client_with_all_data(small):
    ctx, out = finished(small, "centralized")
    assert len(ctx.gathered) == sum(len(ctx.population.users[u].train) for u in ctx.population.seen)
    assert ctx.trainers == (-1,)
    assert {s.row for s in out.scores[ctx.population.unseen[0]]} == {"unseen"}


def test_local_shares_nothing_and_has_no_model_for_the_unseen(small):
    ctx, out = finished(small, "local")
    assert ctx.ownership.travels == []
    assert out.server.state == {}
    assert set(out.scores) == set(ctx.population.seen)


def test_weights_are_samples_or_uniform(small):
    run = small("global-naive", weighting="uniform")
    ctx = build_context(run)
    update, _ = one_round(ctx)
    other = Update(1, {k: v + 1 for k, v in update.state.items()}, 3 * update.examples, 0.0)
    server = Server(ctx.start(), ctx.start())
    server.advance(ctx, [update, other], 1)
    key = ctx.ownership.travels[0]
    torch.testing.assert_close(server.state[key], update.state[key] + 0.5)
    sampled = build_context(small("global-naive"))
    server = Server(sampled.start(), sampled.start())
    server.advance(sampled, [update, other], 1)
    torch.testing.assert_close(server.state[key], update.state[key] + 0.75)


def test_a_strategy_that_needs_statistics_refuses_a_model_without(small, monkeypatch):
    import sys
    import types

    module = types.ModuleType("plain_models")
    module.make = lambda shape, classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    monkeypatch.setitem(sys.modules, "plain_models", module)
    with pytest.raises(UserError, match="strategy 'fedbn' works on running statistics and Sequential has no layer"):
        build_context(small("fedbn", model="plain_models:make"))
    assert execute(small("nonorm", model="plain_models:make", rounds=1)).curve
