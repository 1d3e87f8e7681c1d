"""The claim or limiting case that makes each federated treatment the one it is named after."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.cold_start import starts, window_moments
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role
from fedbn.norms.exchanged import Exchange, ExchangedNorm, exchanged_layers, speak
from fedbn.norms.hybrid import HybridNorm, hybrid_layers
from fedbn.norms.shared_statistics import SharedStatisticsNorm
from fedbn.statistics.consensus import union
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import all_moments
from fedbn.strategies.base import Progress, Update, strategy
from fedbn.strategies.bn_similarity import BNSimilarity
from fedbn.strategies.fedap import FedAP
from fedbn.strategies.fednorm import FedNorm
from fedbn.strategies.fedtan import FedTAN, _told
from fedbn.strategies.static_bn import StaticBN
from simulations.engines.execute import execute
from tests.helpers import same

# FedTAN --------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Three BN layers, one of them on the shortcut, registered in another order than they are met."""

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
    """Three clients of unequal size, sorted by label, with scales of their own; float64."""
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


def conversation(model, data, weights=None):
    """What all clients agree on, and in how many exchanges."""
    aggregates = []
    while True:
        said = [FedTAN().sync_first_batch(copy.deepcopy(model), Examples(x, y, y), aggregates) for x, y in data]
        if said[0] is None:
            return aggregates
        if weights is not None:
            said = [
                {k: Moments.from_variance(w, m.mean, m.m2) for k, m in s.items()}
                for s, w in zip(said, weights, strict=True)
            ]
        aggregates.append(union(said))


def fedtan_gradient(model, data, aggregates):
    """Mean over clients, weighted by their sizes, of the gradients of their local losses."""
    total = sum(len(y) for _, y in data)
    mean = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in data:
        mine = copy.deepcopy(model)
        FedTAN().set_training_mode(mine, Progress(1, 1), aggregates)
        F.cross_entropy(mine(x), y).backward()
        for name, parameter in mine.named_parameters():
            mean[name] += parameter.grad * len(y) / total
    return mean


def error(gradient, oracle):
    pairs = [(gradient[n], p.grad) for n, p in oracle.named_parameters()]
    return max(float((g - o).abs().max() / o.abs().max().clamp_min(1e-3)) for g, o in pairs)


def test_fedtan_is_the_centralized_gradient():
    model = FedTAN().prepare_model(network())
    aggregates = conversation(model, clients())
    assert len(aggregates) == 3 * 3  # and one exchange of the model: 3L + 1
    assert error(fedtan_gradient(model, clients(), aggregates), centralized()) < 1e-12


def test_fedtan_moves_running_statistics_as_one_batch_of_all_would():
    model = FedTAN().prepare_model(network())
    aggregates = conversation(model, clients())
    x, _ = clients()[0]
    FedTAN().set_training_mode(model, Progress(1, 1), aggregates)
    model(x)
    for key, value in centralized().state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def test_without_the_backward_exchange_it_is_not():
    model, data = FedTAN().prepare_model(network()), clients()
    aggregates = conversation(model, data)
    told = _told(model, aggregates)
    total, mean = sum(len(y) for _, y in data), {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in data:
        # The own statistic gradients in place of the agreed ones.
        mine = copy.deepcopy(model)
        own = {p: replace(t, g_mu=None, g_v=None) for p, t in told.items()}
        while (said := speak(mine, x, y, own)) is not None:
            for key, value in said.items():
                path, _, name = key.rpartition("|")
                if name != "n":
                    setattr(own[path], name, value)
        for path, layer in exchanged_layers(mine).items():
            layer.exchange = own[path]
        F.cross_entropy(mine(x), y).backward()
        for name, parameter in mine.named_parameters():
            mean[name] += parameter.grad * len(y) / total
    assert error(mean, centralized()) > 1e-2


def test_uniform_weights_with_unequal_clients_are_not_either():
    model = FedTAN().prepare_model(network())
    aggregates = conversation(model, clients(), weights=[1.0, 1.0, 1.0])
    assert error(fedtan_gradient(model, clients(), aggregates), centralized()) > 1e-2


def test_fedtan_with_one_client_or_two_equal_ones_is_bn():
    x, y = clients()[1]
    plain = network()
    F.cross_entropy(plain(x), y).backward()
    for data in ([(x, y)], [(x, y), (x, y)]):
        model = FedTAN().prepare_model(network())
        assert error(fedtan_gradient(model, data, conversation(model, data)), plain) < 1e-12


def test_fedtan_round_of_one_full_batch_step_is_centralized_training(small):
    options = {"batch_size": 10_000, "momentum": 0.0, "lr": 0.1, "rounds": 2}
    tan, center = federate(small("fedtan", **options)), federate(small("centralized", **options))
    naive = federate(small("global-naive", **options))
    whole = center.server.state

    def gap(out):
        return max(float((out.server.state[k] - whole[k]).abs().max()) for k in whole if k.endswith("weight"))

    assert gap(tan) < 1e-5
    assert gap(naive) > 1e-3


def test_fedtan_is_the_same_under_flower(small):
    run = small("fedtan", clients_per_round=3)
    a, b = federate(run), execute(run, "grid")
    assert same(a.server.state, b.server.state)
    assert a.scores == b.scores


def test_an_exchange_lasts_one_step():
    layer = ExchangedNorm(2).train()
    value = torch.zeros(2)
    layer.exchange = Exchange(value, value + 1, value, value, total=4.0)
    x = torch.tensor([[1.0, 3.0], [3.0, 5.0]])
    assert torch.allclose(layer(x), x / (1 + 1e-5) ** 0.5)
    assert torch.allclose(layer(x), nn.BatchNorm1d(2)(x))


# FixBN, FBN, HBN, static BN ------------------------------------------------------------------------------------------


def test_fixbn_is_global_bn_until_it_freezes(small):
    assert same(federate(small("fixbn:stage1=1")).server.state, federate(small("global-naive")).server.state)
    run = small("fixbn:stage1=0")
    ctx, out = build_context(run), federate(run)
    for key, role in ctx.ownership.roles.items():
        if role is Role.STATISTICS:
            assert torch.equal(out.server.state[key], ctx.initial[key])
        elif role is Role.AFFINE:
            assert not torch.equal(out.server.state[key], ctx.initial[key])


def test_fbn_normalizes_by_constants_and_sends_the_mean_of_its_batches(small):
    ctx = build_context(small("fbn", batch_size=10_000))
    update, _ = client_round(ctx, 0, ctx.start(), None, Progress(1, 2))
    model = ctx.load(ctx.initial)
    layer = next(p for p, m in model.named_modules() if isinstance(m, SharedStatisticsNorm))
    data = ctx.training_data(0).x
    seen = all_moments(ctx.load(ctx.initial), data)[layer]
    torch.testing.assert_close(update.state[f"{layer}.running_mean"], seen.mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update.state[f"{layer}.running_var"], seen.variance().float(), rtol=1e-4, atol=1e-5)


def test_fbn_gradient_takes_its_statistics_for_constants():
    layer, x = SharedStatisticsNorm(2), torch.randn(6, 2, requires_grad=True)
    layer.running_var.fill_(4.0)
    weight = torch.randn(6, 2)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight / (4 + 1e-5) ** 0.5)


def test_fbn_publishes_the_mean_over_its_batches():
    layer, batches = SharedStatisticsNorm(2), torch.randn(3, 8, 2)
    for batch in batches:
        layer(batch)
    layer.publish()
    torch.testing.assert_close(layer.running_mean, batches.mean(1).mean(0))
    torch.testing.assert_close(layer.running_var, batches.var(1, unbiased=False).mean(0))


@pytest.mark.parametrize(("name", "rate"), [("fbn", 0.1), ("hbn", 0.002)])
def test_the_server_follows_at_its_rate(name, rate, small):
    slow, all_at_once = federate(small(name, rounds=1)), federate(small(f"{name}:rate=1", rounds=1))
    ctx = build_context(small(name, rounds=1))
    moved = 0.0
    for key, role in ctx.ownership.roles.items():
        if role is Role.STATISTICS:
            expected = ctx.initial[key].lerp(all_at_once.server.state[key], rate)
            torch.testing.assert_close(slow.server.state[key], expected, rtol=1e-5, atol=1e-6)
            moved += float((expected - ctx.initial[key]).abs().max())
    assert moved > rate / 10


@pytest.mark.parametrize(("gate", "training"), [(50.0, True), (-50.0, False)])
def test_hbn_gate_leads_from_global_to_batch_statistics(gate, training):
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


def test_hbn_trains_its_gate_keeps_it_at_the_client_and_gives_newcomers_the_mean(small):
    run = small("hbn")
    ctx, out = build_context(run), federate(run)
    gates = [k for k, r in ctx.ownership.roles.items() if r is Role.GATE]
    assert gates
    a, b = (ctx.assemble(out.server.state, out.client_states[u]) for u in ctx.population.seen[:2])
    assert all(not torch.equal(a[k], b[k]) for k in gates)
    newcomer = ctx.assemble(out.server.state, None)
    assert all(torch.equal(newcomer[k], out.server.state[k]) for k in gates)


@pytest.mark.parametrize(("name", "rows"), [("hbn", 64), ("hbn-full", None)])
def test_hbn_serves_statistics_of_the_mixture_under_the_final_weights(name, rows, small):
    run = small(name, rounds=1)
    ctx, out = build_context(run), federate(run)
    parts = []
    for user in ctx.population.seen:
        model = ctx.load(ctx.assemble(out.server.state, out.client_states[user])).eval()
        path, layer = next(iter(hybrid_layers(model).items()))
        x = ctx.training_data(user).x[:rows]
        caught = []
        handle = layer.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
        for part in x.split(64):
            model(part)
        handle.remove()
        a = torch.sigmoid(layer.gate).double()
        for value in caught:
            seen = Moments.of(value)
            mean = (1 - a) * layer.running_mean + a * seen.mean
            var = (1 - a) * layer.running_var + a * seen.variance()
            parts.append(Moments.from_variance(float(len(value)), mean.detach(), var.detach()))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    served = out.server.serving
    torch.testing.assert_close(served[f"{path}.running_mean"], whole.mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        served[f"{path}.running_var"], whole.variance(unbiased=True).float(), rtol=1e-4, atol=1e-5
    )


def test_static_bn_sends_no_statistics_and_measures_without_dropout(small):
    run = small("static-bn", rounds=1)
    ctx, out = build_context(run), federate(run)
    for key, role in ctx.ownership.roles.items():
        if role is Role.STATISTICS:
            assert torch.equal(out.server.state[key], ctx.initial[key])
            assert not torch.equal(out.server.serving[key], ctx.initial[key])
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(10, 3)
    (said,) = StaticBN().sync_statistics(net, x)
    torch.testing.assert_close(said["2|mean"].mean, net[1](x).mean(0).double(), rtol=1e-5, atol=1e-6)


def test_static_bn_serves_the_mean_of_all_batches(small):
    run = small("static-bn", rounds=1)
    ctx, out = build_context(run), federate(run)
    means, variances = [], []
    for user in ctx.population.seen:
        model = ctx.load(ctx.assemble(out.server.state, out.client_states[user])).train()
        layer = next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        for rows in ctx.training_data(user).x.split(StaticBN().batch):
            caught = []
            handle = layer.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
            with torch.no_grad():
                model(rows)
            handle.remove()
            flat = caught[0].transpose(0, 1).flatten(1)
            means.append(flat.mean(1))
            variances.append(flat.var(1))
    path = next(p for p, m in ctx.scratch.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    torch.testing.assert_close(out.server.serving[f"{path}.running_mean"], torch.stack(means).mean(0))
    torch.testing.assert_close(out.server.serving[f"{path}.running_var"], torch.stack(variances).mean(0))


# Groups and similarity -----------------------------------------------------------------------------------------------


def test_fednorm_gives_each_group_its_own_bn_and_all_the_same_body(small):
    run = small("fednorm")
    ctx, out = build_context(run), federate(run)
    sent = {u: out.server.sends(ctx, u, serving=True) for u in ctx.population.seen}
    for u, a in sent.items():
        for v, b in sent.items():
            alike = ctx.population.users[u].domain == ctx.population.users[v].domain
            for key, role in ctx.ownership.roles.items():
                if role in (Role.AFFINE, Role.STATISTICS):
                    assert torch.equal(a[key], b[key]) is alike
                elif role is not Role.COUNTER:
                    assert torch.equal(a[key], b[key])


def test_fednorm_needs_known_groups():
    one = tuple(User(str(i), "hapt", None, None) for i in range(3))
    with pytest.raises(UserError, match="fednorm needs users of known groups.*watch"):
        FedNorm().validate_population(Population(one, (), ("a",), ""))


@pytest.mark.parametrize("name", ["fedap:warm_up=1", "bn-similarity:warm_up=1"])
def test_similarity_strategies_are_fedbn_while_they_warm_up(name, small):
    a, b = federate(small(name)), federate(small("fedbn"))
    assert same(a.server.state, b.server.state)
    assert a.scores == b.scores


def test_a_flat_temperature_weighs_all_clients_alike(small):
    run = small("bn-similarity:warm_up=0:tau=1e9", weighting="uniform", rounds=1)
    ctx, out = build_context(run), federate(run)
    for user in ctx.population.seen:
        for key, value in out.server.sends(ctx, user).items():
            torch.testing.assert_close(value, out.server.state[key], rtol=1e-5, atol=1e-6)


def test_whoever_is_nearer_weighs_more_and_temperature_says_how_much():
    distances = torch.tensor([0.0, 1.0, 3.0])
    for tau in (0.5, 2.0):
        weights = BNSimilarity(tau=tau).weights(distances, 0)
        torch.testing.assert_close(weights[1] / weights[0], torch.tensor(-1 / tau).exp())
        torch.testing.assert_close(weights[2] / weights[1], torch.tensor(-2 / tau).exp())


def test_fedap_with_all_weight_on_oneself_is_training_alone(small):
    run = small("fedap:warm_up=0:lam=1")
    ctx, out = build_context(run), federate(run)
    alone = federate(small("local"))
    for user in ctx.population.seen:
        mine = ctx.assemble(out.server.sends(ctx, user), out.client_states[user])
        for key, value in alone.client_states[user].items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["reference", "grid"])
def test_clients_measure_their_moments_once(engine, small, monkeypatch):
    measured = []

    def counted(model, x):
        measured.append(len(x))
        return all_moments(model, x)

    monkeypatch.setattr("fedbn.strategies.similarity.all_moments", counted)
    run = small("fedap:warm_up=0", rounds=3)
    execute(run, engine)
    assert len(measured) == len(build_context(run).population.seen)


def test_fedap_weighs_near_clients_more_and_sums_to_one():
    weights = FedAP(lam=0.2).weights(torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64), 0)
    assert weights.tolist() == pytest.approx([0.2, 0.64, 0.16])
    away = FedAP().weights(torch.tensor([1.0, 4.0], dtype=torch.float64), -1)
    assert away.tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedap:lam=2", "lam must be between 0 and 1"),
        ("bn-similarity:tau=0", "tau must be positive"),
        ("fixbn:stage1=2", "stage1 must be between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        strategy(text)


def test_divergence_counts_an_outlier_less_than_pooling_does():
    def client(user, mean):
        state = {"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.ones(1)}
        return Update(user, state, 1, 0.0)

    keys, progress = ["bn.running_mean", "bn.running_var"], Progress(1, 1)
    updates = [client(0, 0.0), client(1, 0.1), client(2, 10.0)]
    robust = strategy("divergence-pooled").aggregate_statistics(updates, [1, 1, 1], keys, {}, progress)
    plain = strategy("global-pooled").aggregate_statistics(updates, [1, 1, 1], keys, {}, progress)
    assert robust["bn.running_mean"] < 0.8 * plain["bn.running_mean"]
    equal = [client(i, 1.0) for i in range(3)]
    assert (
        strategy("divergence-pooled").aggregate_statistics(equal, [1, 2, 3], keys, {}, progress)["bn.running_mean"]
        == 1.0
    )


# Newcomers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arrived(small):
    run = small("fedbn-seeded")
    ctx, out = build_context(run), federate(run)
    return ctx, out, ctx.population.unseen[0]


def test_every_start_is_scored_for_the_unseen_alone(arrived):
    ctx, out, newcomer = arrived
    named = {s.column for s in out.scores[newcomer]}
    assert named >= {"initial", "mean", "pooled", "nearest", "mixture", "prior"}
    assert not {s.column for s in out.scores[ctx.population.seen[0]]} & {"initial", "pooled", "prior"}


def test_starts_are_what_they_are_called(arrived):
    ctx, out, newcomer = arrived
    state = ctx.assemble(out.server.sends(ctx, newcomer), None)
    client_statistics = out.server.client_statistics
    x = ctx.population.users[newcomer].train.x
    found = starts(ctx, state, client_statistics, x)
    mean_key = next(k for k in state if k.endswith("running_mean"))
    var_key = mean_key.replace("mean", "var")
    means = torch.stack([c[mean_key] for c in client_statistics.values()]).double()
    variances = torch.stack([c[var_key] for c in client_statistics.values()]).double()
    assert torch.equal(found["initial"][mean_key], ctx.initial[mean_key])
    torch.testing.assert_close(found["mean"][var_key], variances.mean(0).float())
    torch.testing.assert_close(found["pooled"][var_key], (variances.mean(0) + means.var(0, unbiased=False)).float())
    assert any(torch.equal(found["nearest"][mean_key], c[mean_key]) for c in client_statistics.values())
    body = next(k for k, r in ctx.ownership.roles.items() if r is Role.BODY)
    assert all(torch.equal(s[body], state[body]) for s in found.values())


def test_a_newcomer_is_nearest_to_itself(arrived):
    ctx, out, _ = arrived
    user = ctx.population.seen[3]
    client_statistics = {u: dict(s) for u, s in out.server.client_statistics.items()}
    state = ctx.assemble(out.server.sends(ctx, user), None)
    x = ctx.population.users[user].train.x
    own, _ = window_moments(ctx, starts(ctx, state, client_statistics, x)["pooled"], x)
    for path, moments in own.items():
        client_statistics[user] |= {
            f"{path}.running_mean": moments.mean.float(),
            f"{path}.running_var": moments.variance().float(),
        }
    # Its moments were taken under the pooled statistics of the registry before; a far client keeps the pool in place.
    found = starts(ctx, state, client_statistics, x)
    assert all(torch.equal(found["nearest"][k], v) for k, v in client_statistics[user].items())
    key = next(k for k in client_statistics[user] if k.endswith("running_mean"))
    far = {name: float((found[name][key] - client_statistics[user][key]).norm()) for name in ("mean", "mixture")}
    assert far["mixture"] < 0.9 * far["mean"]


def test_the_prior_start_has_the_moments_of_a_mixture_of_pool_and_own(arrived):
    ctx, out, newcomer = arrived
    state = ctx.assemble(out.server.sends(ctx, newcomer), None)
    x = ctx.population.users[newcomer].train.x
    first = next(iter(out.server.client_statistics.values()))
    # People who nearly agree: the prior is worth about as much as what the newcomer brings.
    alike = {u: {k: first[k].lerp(v, 0.05) for k, v in s.items()} for u, s in out.server.client_statistics.items()}
    found = starts(ctx, state, alike, x)
    own, _ = window_moments(ctx, found["pooled"], x)
    path = next(iter(own))
    mean, var = (f"{path}.running_{name}" for name in ("mean", "var"))
    pool, prior = ({k: found[name][k].double() for k in (mean, var)} for name in ("pooled", "prior"))
    gap = own[path].mean - pool[mean]
    share = (prior[mean] - pool[mean]) / gap
    assert bool(((share > 0) & (share < 1)).all())
    # Second moments mix as means do.
    second = (1 - share) * (pool[var] + pool[mean] ** 2) + share * (own[path].variance() + own[path].mean ** 2)
    torch.testing.assert_close(prior[var], second - prior[mean] ** 2, rtol=1e-4, atol=1e-5)
    assert float((share * (1 - share) * gap**2).max()) > 1e-4


def test_the_prior_gives_up_channels_in_which_people_differ(arrived):
    ctx, out, newcomer = arrived
    state = ctx.assemble(out.server.sends(ctx, newcomer), None)
    x = ctx.population.users[newcomer].train.x
    first = next(iter(out.server.client_statistics.values()))
    key = next(k for k in first if k.endswith("running_mean"))
    agree = {u: dict(first) for u in out.server.client_statistics}
    found = starts(ctx, state, agree, x)
    torch.testing.assert_close(found["prior"][key], found["pooled"][key], rtol=1e-4, atol=1e-5)
    differ = {u: first | {key: first[key] + 1000.0 * (-1) ** i} for i, u in enumerate(out.server.client_statistics)}
    found = starts(ctx, state, differ, x)
    own, _ = window_moments(ctx, found["pooled"], x)
    torch.testing.assert_close(
        found["prior"][key], own[key.removesuffix(".running_mean")].mean.float(), rtol=1e-2, atol=1e-2
    )
