"""Invariants of all strategies, and the defining properties of single ones."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.loop import federate
from fedbn.federation.server import Server
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn.statistics.recalibration import all_moments, statistics_of
from fedbn.strategies.base import FORMER_HOOKS, NormStrategy, Progress, Update, strategies
from fedbn.strategies.hbn import HBN
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED
from fedbn.tta.adaptation_rates import RATES
from fedbn_simulations.engines.execute import execute
from tests.helpers import assert_statistics, federated, mostly_slow, same, sampling_options, trained

ALL = list(strategies())
FIRST = Progress(1, 2)


def one_round(ctx):
    return client_round(ctx, ctx.trainers[0], ctx.initial_server_state(), None, FIRST)


@pytest.mark.parametrize("name", ALL)
def test_ownership_covers_entries_and_counters_are_local(name, small):
    table = build_context(small(name)).ownership
    assert sorted(table.keys(SHARED, SEEDED, LOCAL)) == sorted(table.roles)
    assert all(table.owner(k) is LOCAL for k, r in table.roles.items() if r is Role.COUNTER)
    rows = table.rows()
    assert sum(r["bytes"] for r in rows) == sum(table.sizes.values())
    assert sum(r["bytes_up"] for r in rows) == sum(table.sizes[k] for k in table.travels)


@pytest.mark.parametrize("name", ALL)
def test_client_round_splits_shared_and_retained_entries(name, small):
    ctx = build_context(small(name))
    update, client_state = one_round(ctx)
    assert list(update.state) == ctx.ownership.travels
    assert list(client_state) == ctx.ownership.retained
    received = {k: v + 1 for k, v in ctx.initial_server_state().items()}
    for key, value in ctx.assemble(received, client_state).items():
        expected = client_state[key] if key in client_state else received[key]
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ALL)
def test_client_round_changes_all_entries_not_received_state(name, small):
    ctx = build_context(small(name))
    start = ctx.initial_server_state()
    before = {k: v.clone() for k, v in start.items()}
    update, client_state = client_round(ctx, ctx.trainers[0], start, None, FIRST)
    assert same(start, before)
    changed = update.state | client_state
    if name == "atp":
        assert not changed.pop(RATES).any(), "rates are learned after the model is trained"
    assert all(not torch.equal(v, ctx.initial[k]) for k, v in changed.items())


@pytest.mark.parametrize("name", ALL)
def test_advance_with_equal_updates_is_identity(name, small):
    ctx = build_context(small(name))
    update, _ = one_round(ctx)
    # The server starts at the same state, because some strategies move its statistics slowly.
    server = Server(update.state, update.state)
    updates = [replace(update, user=u, examples=10 + u) for u in ctx.population.seen[:3]]
    server.advance(ctx, updates, 1)
    assert list(server.state) == ctx.ownership.travels
    assert all(value.dtype == ctx.initial[key].dtype for key, value in server.state.items())
    expected = dict(update.state)
    if isinstance(ctx.strategy, HBN):  # clients send biased variances, and the server corrects the pooled ones
        n = sum(u.examples for u in updates)
        for key in expected:
            if key.endswith("running_var"):
                expected[key] = expected[key] * (1 + ctx.strategy.rate / (n - 1))
    torch.testing.assert_close(server.state, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_newcomer_state_is_complete_and_finite(name, small):
    ctx = build_context(small(name))
    state = ctx.assemble(ctx.initial_server_state(), None)
    assert list(state) == list(ctx.ownership.roles)
    assert ctx.strategy.newcomer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedbn", "fedtan", "hbn", "static-bn"])
def test_run_is_reproducible_and_depends_on_seed(name, small):
    """With every strategy, the grid repeats the numbers of the reference loop (``test_engines.py``)."""
    a, b = (federate(small(name, rounds=1, **sampling_options(name))) for _ in range(2))
    assert same(a.server.state, b.server.state)
    assert a.scores == b.scores
    other = federate(small(name, rounds=1, **sampling_options(name), seed=1))
    assert a.curve != other.curve


@pytest.mark.parametrize("name", mostly_slow(ALL, "fedbn", "silobn", "hbn", "fedtan"))
def test_unsampled_clients_keep_their_state(name, small):
    if strategies()[name].is_centralized:
        pytest.skip("only one client")
    run = small(name, rounds=2, clients_per_round=2, eval_every=2)
    states = {}
    out = federate(run, on_round=lambda n, o: states.setdefault(n, {u: dict(s) for u, s in o.client_states.items()}))
    ctx = build_context(run)
    first, second = set(ctx.sample_clients(1)), set(ctx.sample_clients(2))
    assert set(states[1]) == first
    assert set(out.client_states) == first | second
    for user in first - second:
        assert same(states[1][user], out.client_states[user])


OWN_STATISTICS = {
    "batch-renorm": "normalizes by a mixture of batch and running statistics",
    "ghost-bn": "normalizes parts of a batch",
    "iabn": "corrects BN by the statistics of each window",
    "fbn": "trains with the server's slowly moving statistics",
    "fixbn": "freezes statistics after half of the rounds",
    "hbn": "trains with a mixture of global and batch statistics",
    "hbn-full": "trains with a mixture of global and batch statistics",
    "static-bn": "keeps no running statistics",
}


@pytest.mark.parametrize("name", mostly_slow(ALL, "fedbn", "global-pooled", "groupnorm", "hbn", "fedtan", "mtfl"))
def test_strategy_with_one_user_equals_local(name, small):
    options = {"partition": "iid:clients=1", "rounds": 2}
    local = trained(small("local", **options))
    ctx = build_context(small(name, **options))
    if ctx.ownership.roles.keys() != local.client_states[ctx.population.seen[0]].keys():
        pytest.skip("different network than the bounds")
    if name in OWN_STATISTICS:
        pytest.skip(OWN_STATISTICS[name])
    out = trained(small(name, **options))
    state = out.server.state | next(iter(out.client_states.values()))
    torch.testing.assert_close(state, next(iter(local.client_states.values())), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("name", ALL)
def test_strategy_file_is_short_and_documented(name):
    cls = strategies()[name]
    assert len(inspect.getsource(inspect.getmodule(cls)).splitlines()) < 80
    assert cls.about
    assert ">>>" in (cls.__doc__ or "")


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("prepare_modl", "prepare_model"),
        ("before_training", "before_local_training"),
        ("aggregate_statistic", "aggregate_statistics"),
        *FORMER_HOOKS.items(),
    ],
)
def test_strategy_rejects_misspelled_and_former_hooks(name, hook):
    value = True if isinstance(getattr(NormStrategy, hook), bool) else lambda self, *args: None
    with pytest.raises(UserError, match=f"class Own defines '{name}', which NormStrategy does not use.*'{hook}'"):
        type("Own", (NormStrategy,), {name: value})


def test_strategy_rejects_misspelled_owner():
    with pytest.raises(UserError, match="defines 'statistic'.*rename it to 'statistics'"):
        type("Own", (NormStrategy,), {"statistic": LOCAL})


def test_strategy_accepts_hooks_helpers_and_options():
    own = type("Own", (NormStrategy,), {"prepare_model": lambda self, model: model, "resting": lambda self: True})
    assert not hasattr(own, "prepare")

    @dataclass(frozen=True)
    class Derived(own):
        view: bool = True
        statistics = LOCAL

        def resting(self):
            return False

        def _prepare(self):
            """A private name may resemble a former hook."""

        @property
        def distance(self):
            return 0.0

    assert Derived().view


# Single strategies --------------------------------------------------------------------------------------------------


def test_fedbn_users_differ_only_in_bn(small):
    ctx, out = federated(small("fedbn"))
    a, b = (ctx.assemble(out.server.state, out.client_states[u]) for u in ctx.population.seen[:2])
    for key, role in ctx.ownership.roles.items():
        if role in (Role.AFFINE, Role.STATISTICS):
            assert not torch.equal(a[key], b[key])
        elif role is not Role.COUNTER:
            assert torch.equal(a[key], b[key])


def test_fedbn_seeded_is_fedbn_plus_mean_for_newcomers(small):
    ctx, seeded = federated(small("fedbn-seeded"))
    plain = trained(small("fedbn"))
    for user in ctx.population.seen:
        assert same(seeded.client_states[user], plain.client_states[user])
        assert seeded.scores[user] == plain.scores[user]
    key, sizes = "features.1.weight", {u: len(ctx.training_data(u)) for u in ctx.population.seen}
    mean = sum(seeded.client_states[u][key].double() * n for u, n in sizes.items()) / sum(sizes.values())
    newcomer = ctx.assemble(seeded.server.state, None)
    torch.testing.assert_close(newcomer[key].double(), mean, rtol=1e-6, atol=1e-6)


def test_silobn_equals_params_only_for_persistent_users(small):
    silo, params = (trained(small(name, clients_per_round=3, rounds=3)) for name in ("silobn", "params-only"))
    assert same(silo.server.state, params.server.state)
    assert silo.scores == params.scores


@pytest.mark.slow
def test_mtfl_choices_equal_named_strategies(small):
    for private, name in (("us", "silobn"), ("usyb", "fedbn"), ("none", "global-naive")):
        a, b = trained(small(f"mtfl:private={private}")), trained(small(name))
        assert same(a.server.state, b.server.state), name
        assert a.scores == b.scores, name
    ctx = build_context(small("mtfl"))
    assert ctx.ownership.owner("features.1.weight") is LOCAL
    assert ctx.ownership.owner("features.1.running_var") is SHARED


def test_global_pooled_and_naive_differ_only_in_variances(small):
    ctx, naive = federated(small("global-naive"))
    pooled = trained(small("global-pooled"))
    for key, value in naive.server.state.items():
        if key.endswith("running_var"):
            assert bool((pooled.server.state[key] >= value - 1e-6).all())
            assert bool((pooled.server.state[key] > value + 1e-4).any())
        else:
            assert torch.equal(value, pooled.server.state[key]), key
    assert ctx.ownership.roles["features.1.running_var"] is Role.STATISTICS


def test_global_recalibrated_serves_moments_of_all_data(small):
    ctx, out = federated(small("global-recalibrated"))
    x = torch.cat([ctx.training_data(u).x for u in ctx.population.seen])
    model = ctx.load(ctx.assemble(out.server.serving, None))
    stored = {k: v.clone() for k, v in statistics_of(model).items()}
    for path, moments in all_moments(model, x).items():
        assert_statistics(stored, path, moments.mean, moments.variance(unbiased=True))
    assert not torch.equal(out.server.state["features.1.running_var"], out.server.serving["features.1.running_var"])


def test_centralized_has_one_client_with_all_data(small):
    ctx, out = federated(small("centralized"))
    assert len(ctx.pooled_training_data) == sum(len(ctx.population.users[u].train) for u in ctx.population.seen)
    assert ctx.trainers == (-1,)
    assert {s.row for s in out.scores[ctx.population.unseen[0]]} == {"unseen"}


def test_local_shares_nothing_and_skips_unseen_users(small):
    ctx, out = federated(small("local"))
    assert ctx.ownership.travels == []
    assert out.server.state == {}
    assert set(out.scores) == set(ctx.population.seen)


def test_weighting_by_samples_or_uniform(small):
    update, _ = one_round(build_context(small("global-naive", weighting="uniform")))
    other = Update(1, {k: v + 1 for k, v in update.state.items()}, 3 * update.examples, 0.0)
    for options, mean in (({"weighting": "uniform"}, 0.5), ({}, 0.75)):
        ctx = build_context(small("global-naive", **options))
        server = Server(ctx.initial_server_state(), ctx.initial_server_state())
        server.advance(ctx, [update, other], 1)
        key = ctx.ownership.travels[0]
        torch.testing.assert_close(server.state[key], update.state[key] + mean)


def test_fedbn_rejects_model_without_statistics(small, register_model):
    text = register_model(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, classes)))
    with pytest.raises(UserError, match="strategy 'fedbn' works on running statistics and Sequential has no layer"):
        build_context(small("fedbn", model=text))
    assert execute(small("nonorm", model=text, rounds=1)).curve
