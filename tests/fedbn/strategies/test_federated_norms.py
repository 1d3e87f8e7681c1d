"""Defining properties and limiting cases of strategies with their own aggregation, and of cold starts."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.cold_start import cold_starts, statistics_for, summarize, window_moments
from fedbn.federation.schema import PROBE_ROWS
from fedbn.federation.setup import build_context
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import Role, statistics_layers
from fedbn.norms.exchanged import Exchange, ExchangedNorm, exchanged_layers, next_message
from fedbn.norms.hybrid import HybridNorm, hybrid_layers
from fedbn.norms.shared_statistics import SharedStatisticsNorm
from fedbn.statistics.consensus import union
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import all_moments
from fedbn.strategies.base import Progress, Update, strategy
from fedbn.strategies.bn_similarity import BNSimilarity
from fedbn.strategies.fedap import FedAP
from fedbn.strategies.fednorm import FedNorm
from fedbn.strategies.fedtan import FedTAN, _exchanges
from fedbn.strategies.hbn import HBN
from fedbn.strategies.hbn_full import HBNFull
from fedbn.strategies.static_bn import StaticBN
from fedbn_simulations.engines.execute import execute
from tests.helpers import assert_engines_agree, assert_statistics, federated, same, trained

# FedTAN --------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Three BN layers, one of them on the shortcut, not registered in the order of the forward pass."""

    def __init__(self, norm):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.shortcut_norm, self.first_norm, self.second_norm = norm(5), norm(4), norm(5)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.shortcut = nn.Conv2d(1, 5, 1)

    def forward(self, x):
        inner = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return self.head(torch.relu(inner + self.shortcut_norm(self.shortcut(x))).mean((2, 3)))


def clients():
    """Three clients of unequal size with one label and a different scale each; float64."""
    draw = torch.Generator().manual_seed(1)
    out = []
    for label, n in enumerate((4, 7, 13)):
        x = torch.randn(n, 1, 5, 5, generator=draw, dtype=torch.float64) * (label + 1) + label
        out.append((x, torch.full((n,), label)))
    return out


def network():
    torch.manual_seed(0)
    model = Residual(nn.BatchNorm2d).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def centralized():
    model = network()
    x, y = (torch.cat(part) for part in zip(*clients(), strict=True))
    F.cross_entropy(model(x), y).backward()
    return model


def synchronize(model, data, weights=None):
    """Aggregates of all exchanges between the clients."""
    aggregates = []
    while True:
        messages = [FedTAN().sync_first_batch(copy.deepcopy(model), Examples(x, y, y), aggregates) for x, y in data]
        if messages[0] is None:
            return aggregates
        if weights is not None:
            pairs = zip(messages, weights, strict=True)
            messages = [{k: Moments.from_variance(w, m.mean, m.m2) for k, m in s.items()} for s, w in pairs]
        aggregates.append(union(messages))


def mean_gradient(model, data, set_exchanges):
    """Mean over clients, weighted by their sizes, of the gradients of their local losses."""
    total = sum(len(y) for _, y in data)
    mean = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in data:
        client = copy.deepcopy(model)
        set_exchanges(client, x, y)
        F.cross_entropy(client(x), y).backward()
        for name, parameter in client.named_parameters():
            mean[name] += parameter.grad * len(y) / total
    return mean


def fedtan_gradient(model, data, aggregates):
    return mean_gradient(model, data, lambda client, *_: FedTAN().set_training_mode(client, Progress(1, 1), aggregates))


def error(gradient, reference):
    pairs = [(gradient[n], p.grad) for n, p in reference.named_parameters()]
    return max(float((g - r).abs().max() / r.abs().max().clamp_min(1e-3)) for g, r in pairs)


def test_fedtan_equals_centralized_gradient():
    model = FedTAN().prepare_model(network())
    aggregates = synchronize(model, clients())
    assert len(aggregates) == 3 * 3  # and one exchange of the model: 3L + 1
    assert error(fedtan_gradient(model, clients(), aggregates), centralized()) < 1e-12


def test_fedtan_updates_statistics_like_pooled_batch():
    model = FedTAN().prepare_model(network())
    aggregates = synchronize(model, clients())
    x, _ = clients()[0]
    FedTAN().set_training_mode(model, Progress(1, 1), aggregates)
    model(x)
    torch.testing.assert_close(model.state_dict(), centralized().state_dict(), rtol=1e-12, atol=1e-12)


def test_fedtan_without_backward_exchange_is_inexact():
    model, data = FedTAN().prepare_model(network()), clients()
    exchanges = _exchanges(model, synchronize(model, data))

    def use_own_gradients(client, x, y):
        own = {p: replace(e, g_mu=None, g_v=None) for p, e in exchanges.items()}
        while (message := next_message(client, x, y, own)) is not None:
            for key, value in message.items():
                path, _, name = key.rpartition("|")
                if name != "n":
                    setattr(own[path], name, value)
        for path, layer in exchanged_layers(client).items():
            layer.exchange = own[path]

    assert error(mean_gradient(model, data, use_own_gradients), centralized()) > 1e-2


def test_fedtan_with_uniform_weights_is_inexact():
    model = FedTAN().prepare_model(network())
    aggregates = synchronize(model, clients(), weights=[1.0, 1.0, 1.0])
    assert error(fedtan_gradient(model, clients(), aggregates), centralized()) > 1e-2


def test_fedtan_with_equal_clients_is_bn():
    x, y = clients()[1]
    plain = network()
    F.cross_entropy(plain(x), y).backward()
    for data in ([(x, y)], [(x, y), (x, y)]):
        model = FedTAN().prepare_model(network())
        assert error(fedtan_gradient(model, data, synchronize(model, data)), plain) < 1e-12


def test_fedtan_full_batch_round_is_centralized_training(small):
    options = {"batch_size": 10_000, "momentum": 0.0, "lr": 0.1, "rounds": 2}
    names = ("fedtan", "global-naive", "centralized")
    fedtan, naive, expected = (trained(small(name, **options)).server.state for name in names)

    def gap(state):
        return max(float((state[k] - expected[k]).abs().max()) for k in expected if k.endswith("weight"))

    assert gap(fedtan) < 1e-5
    assert gap(naive) > 1e-3


def test_fedtan_engines_agree(small):
    assert_engines_agree(small("fedtan", clients_per_round=3))


def test_exchanged_norm_uses_exchange_for_one_step():
    layer = ExchangedNorm(2).train()
    value = torch.zeros(2)
    layer.exchange = Exchange(value, value + 1, value, value, total=4.0)
    x = torch.tensor([[1.0, 3.0], [3.0, 5.0]])
    assert torch.allclose(layer(x), x / (1 + 1e-5) ** 0.5)
    assert torch.allclose(layer(x), nn.BatchNorm1d(2)(x))


# FixBN, FBN, HBN, static BN ------------------------------------------------------------------------------------------


def inputs_of(layer, model, batches):
    """Inputs of a layer in the forward passes of batches."""
    inputs = []
    with torch.no_grad(), capture_inputs({"": layer}, lambda _, value: inputs.append(value)):
        for batch in batches:
            model(batch)
    return inputs


def test_fixbn_is_global_bn_until_frozen(small):
    assert same(trained(small("fixbn:stage1=1")).server.state, trained(small("global-naive")).server.state)
    ctx, out = federated(small("fixbn:stage1=0"))
    for key, role in ctx.ownership.roles.items():
        if role is Role.STATISTICS:
            assert torch.equal(out.server.state[key], ctx.initial[key])
        elif role is Role.AFFINE:
            assert not torch.equal(out.server.state[key], ctx.initial[key])


def test_fbn_sends_mean_batch_statistics(small):
    ctx = build_context(small("fbn", batch_size=10_000))
    update, _ = client_round(ctx, 0, ctx.initial_server_state(), None, Progress(1, 2))
    model = ctx.load(ctx.initial)
    path = next(p for p, m in model.named_modules() if isinstance(m, SharedStatisticsNorm))
    moments = all_moments(model, ctx.training_data(0).x)[path]
    assert_statistics(update.state, path, moments.mean, moments.variance())


def test_fbn_gradient_treats_statistics_as_constants():
    layer, x = SharedStatisticsNorm(2), torch.randn(6, 2, requires_grad=True)
    layer.running_var.fill_(4.0)
    weight = torch.randn(6, 2)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight / (4 + 1e-5) ** 0.5)


def test_fbn_publishes_mean_over_batches():
    layer, batches = SharedStatisticsNorm(2), torch.randn(3, 8, 2)
    for batch in batches:
        layer(batch)
    layer.publish()
    torch.testing.assert_close(layer.running_mean, batches.mean(1).mean(0))
    torch.testing.assert_close(layer.running_var, batches.var(1, unbiased=False).mean(0))


@pytest.mark.parametrize(("name", "rate"), [("fbn", 0.1), ("hbn", 0.002)])
def test_server_statistics_move_by_rate(name, rate, small):
    slow, immediate = trained(small(name, rounds=1)), trained(small(f"{name}:rate=1", rounds=1))
    ctx = build_context(small(name, rounds=1))
    moved = 0.0
    for key, role in ctx.ownership.roles.items():
        if role is Role.STATISTICS:
            expected = ctx.initial[key].lerp(immediate.server.state[key], rate)
            torch.testing.assert_close(slow.server.state[key], expected, rtol=1e-5, atol=1e-6)
            moved += float((expected - ctx.initial[key]).abs().max())
    assert moved > rate / 10


@pytest.mark.parametrize(("gate", "training"), [(50.0, True), (-50.0, False)])
def test_hbn_gate_interpolates_global_and_batch_statistics(gate, training):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, requires_grad=True)
    layer, bn = HybridNorm(3), nn.BatchNorm1d(3).train(training)
    for module in (layer, bn):
        module.running_mean.fill_(0.5)
        module.running_var.fill_(2.0)
    with torch.no_grad():
        layer.gate.fill_(gate)
    torch.testing.assert_close(layer(x), bn(x))
    g, h = (torch.autograd.grad((m(x) ** 3).sum(), x)[0] for m in (layer, bn))
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x) if not training else layer.eval()(x))


def test_hbn_gate_is_trained_local_and_seeded(small):
    ctx, out = federated(small("hbn"))
    gates = [k for k, r in ctx.ownership.roles.items() if r is Role.GATE]
    assert gates
    a, b = (ctx.assemble(out.server.state, out.client_states[u]) for u in ctx.population.seen[:2])
    assert all(not torch.equal(a[k], b[k]) for k in gates)
    newcomer = ctx.assemble(out.server.state, None)
    assert all(torch.equal(newcomer[k], out.server.state[k]) for k in gates)


@pytest.mark.parametrize(("name", "rows"), [("hbn", 64), ("hbn-full", None)])
def test_hbn_serves_mixture_statistics_of_final_weights(name, rows, small):
    ctx, out = federated(small(name, rounds=1))
    parts = []
    for user in ctx.population.seen:
        model = ctx.load(ctx.assemble(out.server.state, out.client_states[user])).eval()
        path, layer = next(iter(hybrid_layers(model).items()))
        a = torch.sigmoid(layer.gate).double()
        for value in inputs_of(layer, model, ctx.training_data(user).x[:rows].split(64)):
            batch = Moments.of(value)
            mean = (1 - a) * layer.running_mean + a * batch.mean
            var = (1 - a) * layer.running_var + a * batch.variance()
            parts.append(Moments.from_variance(float(len(value)), mean.detach(), var.detach()))
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    assert_statistics(out.server.serving, path, total.mean, total.variance(unbiased=True))


@pytest.mark.parametrize("strategy", [HBN(rate=0.3), HBNFull(rate=0.3)], ids=str)
def test_hbn_pools_biased_variances_by_measured_rows(strategy):
    torch.manual_seed(0)
    net = strategy.prepare_model(nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 3))).double()
    net[0].running_mean.copy_(torch.tensor([0.5, -1.0]))
    net[0].running_var.copy_(torch.tensor([2.0, 0.7]))
    old = {k: v.clone() for k, v in net.state_dict().items()}
    a, keys = 1 / (1 + math.exp(-0.4)), ["0.running_mean", "0.running_var"]
    updates, parts = [], []
    for user, n in enumerate((3, 70, 9)):
        x = torch.randn(n, 2, 4, dtype=torch.float64) * (1 + user) + user
        client = copy.deepcopy(net)
        nn.init.constant_(client[0].gate, 0.4)
        zeros = torch.zeros(n, dtype=torch.long)
        strategy.before_local_training(client, Examples(x, zeros, zeros), Progress(1, 2))
        strategy.after_local_training(client)
        updates.append(Update(user, {k: v.clone() for k, v in client.state_dict().items()}, n, 0.0))
        for rows in x.split(64)[:1] if strategy.rows else x.split(64):
            values = rows.transpose(0, 1).flatten(1)
            mean = (1 - a) * old[keys[0]] + a * values.mean(1)
            parts.append((len(rows), mean, (1 - a) * old[keys[1]] + a * values.var(1, correction=0)))
    total = sum(n for n, _, _ in parts)
    mean = sum(n * m for n, m, _ in parts) / total
    var = sum(n * (v + (m - mean) ** 2) for n, m, v in parts) / (total - 1)
    new = strategy.aggregate_statistics(updates, [1.0, 1.0, 1.0], keys, old, Progress(1, 2))
    expected = [0.7 * old[k] + 0.3 * t for k, t in zip(keys, (mean, var))]
    torch.testing.assert_close([new[k] for k in keys], expected, rtol=1e-9, atol=1e-9)


def test_static_bn_sends_no_statistics_and_disables_dropout(small):
    ctx, out = federated(small("static-bn", rounds=1))
    for key, role in ctx.ownership.roles.items():
        if role is Role.STATISTICS:
            assert torch.equal(out.server.state[key], ctx.initial[key])
            assert not torch.equal(out.server.serving[key], ctx.initial[key])
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(10, 3)
    (message,) = StaticBN().sync_statistics(net, x)
    torch.testing.assert_close(message["2|mean"].mean, net[1](x).mean(0).double(), rtol=1e-5, atol=1e-6)


def test_static_bn_serves_mean_of_all_batches(small):
    ctx, out = federated(small("static-bn", rounds=1))
    means, variances = [], []
    for user in ctx.population.seen:
        model = ctx.load(ctx.assemble(out.server.state, out.client_states[user])).train()
        path, layer = next(iter(statistics_layers(model).items()))
        for value in inputs_of(layer, model, ctx.training_data(user).x.split(StaticBN().batch)):
            flat = value.transpose(0, 1).flatten(1)
            means.append(flat.mean(1))
            variances.append(flat.var(1))
    torch.testing.assert_close(out.server.serving[f"{path}.running_mean"], torch.stack(means).mean(0))
    torch.testing.assert_close(out.server.serving[f"{path}.running_var"], torch.stack(variances).mean(0))


# Groups and similarity -----------------------------------------------------------------------------------------------


def test_fednorm_shares_bn_within_groups_and_body_with_all(small):
    ctx, out = federated(small("fednorm"))
    states = {u: out.server.state_for(ctx, u, serving=True) for u in ctx.population.seen}
    for u, a in states.items():
        for v, b in states.items():
            same_group = ctx.population.users[u].domain == ctx.population.users[v].domain
            for key, role in ctx.ownership.roles.items():
                if role in (Role.AFFINE, Role.STATISTICS):
                    assert torch.equal(a[key], b[key]) is same_group
                elif role is not Role.COUNTER:
                    assert torch.equal(a[key], b[key])


def test_fednorm_rejects_single_group():
    users = tuple(User(str(i), "hapt", None, None) for i in range(3))
    with pytest.raises(UserError, match="fednorm needs users of known groups.*watch"):
        FedNorm().validate_population(Population(users, (), ("a",), ""))


@pytest.mark.parametrize("name", ["fedap:warm_up=1", "bn-similarity:warm_up=1"])
def test_similarity_strategies_warm_up_as_fedbn(name, small):
    a, b = trained(small(name)), trained(small("fedbn"))
    assert same(a.server.state, b.server.state)
    assert a.scores == b.scores


def test_bn_similarity_high_temperature_is_uniform(small):
    ctx, out = federated(small("bn-similarity:warm_up=0:tau=1e9", weighting="uniform", rounds=1))
    for user in ctx.population.seen:
        torch.testing.assert_close(out.server.state_for(ctx, user), out.server.state, rtol=1e-5, atol=1e-6)


def test_bn_similarity_weights_decay_with_distance():
    distances = torch.tensor([0.0, 1.0, 3.0])
    for tau in (0.5, 2.0):
        weights = BNSimilarity(tau=tau).weights(distances, 0)
        torch.testing.assert_close(weights[1] / weights[0], torch.tensor(-1 / tau).exp())
        torch.testing.assert_close(weights[2] / weights[1], torch.tensor(-2 / tau).exp())


def test_fedap_with_lam_1_equals_local(small):
    ctx, out = federated(small("fedap:warm_up=0:lam=1"))
    local = trained(small("local"))
    for user in ctx.population.seen:
        state = ctx.assemble(out.server.state_for(ctx, user), out.client_states[user])
        torch.testing.assert_close(state, local.client_states[user], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["reference", "grid"])
def test_similarity_clients_measure_moments_once(engine, small, monkeypatch):
    measured = []

    def counted(model, x):
        if len(x) > PROBE_ROWS:  # of users, and not of the server's schema
            measured.append(len(x))
        return all_moments(model, x)

    monkeypatch.setattr("fedbn.strategies.similarity.all_moments", counted)
    run = small("fedap:warm_up=0", rounds=3)
    execute(run, engine)
    assert len(measured) == len(build_context(run).population.seen)


def test_fedap_weights_favor_near_clients_and_sum_to_one():
    weights = FedAP(lam=0.2).weights(torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64), 0)
    assert weights.tolist() == pytest.approx([0.2, 0.64, 0.16])
    excluded = FedAP().weights(torch.tensor([1.0, 4.0], dtype=torch.float64), -1)
    assert excluded.tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedap:lam=2", "lam must be between 0 and 1"),
        ("bn-similarity:tau=0", "tau must be positive"),
        ("fixbn:stage1=2", "stage1 must be between 0 and 1"),
    ],
)
def test_strategy_rejects_bad_options(text, message):
    with pytest.raises(UserError, match=message):
        strategy(text)


def test_divergence_pooled_downweights_outliers():
    def client(user, mean):
        return Update(user, {"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.ones(1)}, 1, 0.0)

    def mean_of(name, updates, weights):
        keys = ["bn.running_mean", "bn.running_var"]
        return strategy(name).aggregate_statistics(updates, weights, keys, {}, Progress(1, 1))["bn.running_mean"]

    updates = [client(0, 0.0), client(1, 0.1), client(2, 10.0)]
    plain = mean_of("global-pooled", updates, [1, 1, 1])
    assert mean_of("divergence-pooled", updates, [1, 1, 1]) < 0.8 * plain
    assert mean_of("divergence-pooled", [client(i, 1.0) for i in range(3)], [1, 2, 3]) == 1.0


# Cold starts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def federation(small):
    return federated(small("fedbn-seeded"))


@pytest.fixture
def newcomer(federation):
    """Context, statistics of the clients, and state and rows of an unseen user."""
    ctx, out = federation
    return ctx, out.server.client_statistics, *state_and_rows(ctx, out, ctx.population.unseen[0])


def state_and_rows(ctx, out, user):
    return ctx.assemble(out.server.state_for(ctx, user), None), ctx.population.users[user].train.x


def test_cold_starts_are_scored_for_unseen_users_only(federation):
    ctx, out = federation
    columns = {s.column for s in out.scores[ctx.population.unseen[0]]}
    assert columns >= {"initial", "mean", "pooled", "nearest", "mixture", "prior"}
    assert not {s.column for s in out.scores[ctx.population.seen[0]]} & {"initial", "pooled", "prior"}


def test_cold_starts_match_definitions(newcomer):
    ctx, client_statistics, state, x = newcomer
    states = cold_starts(ctx, state, summarize(ctx, client_statistics), x)
    mean_key = next(k for k in state if k.endswith("running_mean"))
    var_key = mean_key.replace("mean", "var")
    means = torch.stack([c[mean_key] for c in client_statistics.values()]).double()
    variances = torch.stack([c[var_key] for c in client_statistics.values()]).double()
    assert torch.equal(states["initial"][mean_key], ctx.initial[mean_key])
    torch.testing.assert_close(states["mean"][var_key], variances.mean(0).float())
    torch.testing.assert_close(states["pooled"][var_key], (variances.mean(0) + means.var(0, unbiased=False)).float())
    assert any(torch.equal(states["nearest"][mean_key], c[mean_key]) for c in client_statistics.values())
    body = next(k for k, r in ctx.ownership.roles.items() if r is Role.BODY)
    assert all(torch.equal(s[body], state[body]) for s in states.values())


def test_client_statistics_do_not_reveal_indices(newcomer):
    """Users receive the same message whatever the indices of the clients."""
    ctx, client_statistics, *_ = newcomer
    reversed_indices = dict(zip(client_statistics, reversed(client_statistics.values()), strict=True))
    a, b = summarize(ctx, client_statistics), summarize(ctx, reversed_indices)
    assert len(a.clients) == len(client_statistics)
    assert all(same(x, y) for x, y in zip(a.clients, b.clients, strict=True))
    torch.testing.assert_close(a.pooled, b.pooled)


def test_users_receive_only_the_client_statistics_that_they_need(newcomer, small):
    ctx, client_statistics, state, x = newcomer
    summary = summarize(ctx, client_statistics)
    seen, unseen = ctx.population.seen[0], ctx.population.unseen[0]
    assert statistics_for(ctx, unseen, summary) is summary
    assert statistics_for(ctx, unseen, summary, cold_starts=False) is None
    assert statistics_for(ctx, seen, summary) is statistics_for(ctx, unseen, None) is summarize(ctx, {}) is None
    with_prior = build_context(replace(ctx.run, rule="population"))
    for user, asked in ((seen, True), (unseen, False)):
        received = statistics_for(with_prior, user, summary, cold_starts=asked)
        assert (received.clients, received.pooled) == ((), summary.pooled)
        assert set(cold_starts(ctx, state, received, x)) == {"initial", "mean", "pooled", "prior"}


def test_cold_start_nearest_finds_equal_client(federation):
    ctx, out = federation
    user = ctx.population.seen[3]
    client_statistics = {u: dict(s) for u, s in out.server.client_statistics.items()}
    state, x = state_and_rows(ctx, out, user)
    own, _ = window_moments(ctx, cold_starts(ctx, state, summarize(ctx, client_statistics), x)["pooled"], x)
    for path, moments in own.items():
        client_statistics[user][f"{path}.running_mean"] = moments.mean.float()
        client_statistics[user][f"{path}.running_var"] = moments.variance().float()
    # The user's moments were measured under the pooled statistics before this change.
    states = cold_starts(ctx, state, summarize(ctx, client_statistics), x)
    assert all(torch.equal(states["nearest"][k], v) for k, v in client_statistics[user].items())
    key = next(k for k in client_statistics[user] if k.endswith("running_mean"))
    distances = {name: float((states[name][key] - client_statistics[user][key]).norm()) for name in ("mean", "mixture")}
    assert distances["mixture"] < 0.9 * distances["mean"]


def test_cold_start_prior_mixes_pooled_and_own_moments(newcomer):
    ctx, client_statistics, state, x = newcomer
    first = next(iter(client_statistics.values()))
    # Clients nearly agree, so that the pooled and the newcomer's own moments have similar weights.
    similar = {u: {k: first[k].lerp(v, 0.05) for k, v in s.items()} for u, s in client_statistics.items()}
    states = cold_starts(ctx, state, summarize(ctx, similar), x)
    own, _ = window_moments(ctx, states["pooled"], x)
    path = next(iter(own))
    mean, var = (f"{path}.running_{name}" for name in ("mean", "var"))
    pooled, prior = ({k: states[name][k].double() for k in (mean, var)} for name in ("pooled", "prior"))
    gap = own[path].mean - pooled[mean]
    share = (prior[mean] - pooled[mean]) / gap
    assert bool(((share > 0) & (share < 1)).all())
    # Second moments mix as means do.
    second = (1 - share) * (pooled[var] + pooled[mean] ** 2) + share * (own[path].variance() + own[path].mean ** 2)
    torch.testing.assert_close(prior[var], second - prior[mean] ** 2, rtol=1e-4, atol=1e-5)
    assert float((share * (1 - share) * gap**2).max()) > 1e-4


def test_cold_start_prior_depends_on_client_variance(newcomer):
    ctx, client_statistics, state, x = newcomer
    first = next(iter(client_statistics.values()))
    key = next(k for k in first if k.endswith("running_mean"))
    states = cold_starts(ctx, state, summarize(ctx, dict.fromkeys(client_statistics, first)), x)
    torch.testing.assert_close(states["prior"][key], states["pooled"][key], rtol=1e-4, atol=1e-5)
    differ = {u: first | {key: first[key] + 1000.0 * (-1) ** i} for i, u in enumerate(client_statistics)}
    states = cold_starts(ctx, state, summarize(ctx, differ), x)
    own, _ = window_moments(ctx, states["pooled"], x)
    mean = own[key.removesuffix(".running_mean")].mean.float()
    torch.testing.assert_close(states["prior"][key], mean, rtol=1e-2, atol=1e-2)
