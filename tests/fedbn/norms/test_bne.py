"""Domain-specific BN and embeddings: one network, statistics per domain, weights by distance to each domain."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbn.nn.conversion import convert
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import Role, roles, statistics_layers
from fedbn.norms.bne import BNE, DomainNorm, distance, domain_layers, register, set_domain
from fedbn.statistics.moments import Moments
from fedbn.statistics.recalibration import recalibrate, statistics_of
from tests.fedbn.helpers import network, rejects


def data(n=6, seed=1, shift=0.0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def embedded(k=3):
    """A network with k domains whose statistics were computed on different inputs."""
    net = convert(network(), "bne", domains=k)
    for d in range(k):
        set_domain(net, d)
        for i in range(20):
            net.train()(data(20, i, shift=3.0 * d))
    return net.eval()


def test_bne_with_one_domain_is_batch_norm():
    plain = network()
    plain.train()(data(30, 5))
    plain.eval()
    log_p, weights = BNE(convert(copy.deepcopy(plain), "bne", domains=1)).eval()(data())
    torch.testing.assert_close(log_p, F.log_softmax(plain(data()), 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(weights, torch.ones(6, 1, dtype=torch.float64))


def test_domain_norm_trains_only_the_current_domain():
    plain, converted = network(), convert(network(), "bne", domains=3)
    set_domain(converted, 1)
    x = data(12)
    assert torch.equal(plain.train()(x), converted.train()(x))
    for path, layer in domain_layers(converted).items():
        bn = plain.get_submodule(path)
        assert torch.equal(layer.domain_mean[1], bn.running_mean)
        assert torch.equal(layer.domain_var[1], bn.running_var)
        for d in (0, 2):
            assert float(layer.domain_mean[d].abs().sum()) == 0
            assert torch.equal(layer.domain_var[d], torch.ones_like(layer.domain_var[d]))


def slow_weights(net, x, k):
    """Weights computed by hooks and torch's own functions, one sample at a time."""
    out = []
    for sample in x.split(1):
        closeness = []
        for d in range(k):
            set_domain(net, d)
            total = []

            def add_distance(path, value, d=d, total=total):
                flat, layer = value[0].flatten(1), net.get_submodule(path)
                total.append(((flat.mean(1) - layer.domain_mean[d]) ** 2).sum())
                total.append(((flat.std(1, correction=0) - layer.domain_var[d].sqrt()) ** 2).sum())

            with capture_inputs(domain_layers(net), add_distance):
                net(sample)
            closeness.append(1 / (sum(total) + 1e-8))
        out.append(torch.stack(closeness) / sum(closeness))
    return torch.stack(out)


def test_bne_weights_and_mixture_match_formulas():
    net, x = embedded(), data(4, 9, shift=2.0)
    log_p, weights = BNE(net).eval()(x)
    torch.testing.assert_close(weights, slow_weights(net, x, 3), rtol=1e-10, atol=1e-12)
    logits = []
    for d in range(3):
        set_domain(net, d)
        logits.append(net(x))
    mixture = sum(weights[:, d, None] * logits[d].softmax(1) for d in range(3))
    torch.testing.assert_close(log_p.exp(), mixture, rtol=1e-10, atol=1e-12)
    mixed, _ = BNE(net, mix="logits").eval()(x)
    expected = sum(weights[:, d, None] * logits[d] for d in range(3)).softmax(1)
    torch.testing.assert_close(mixed.exp(), expected, rtol=1e-10, atol=1e-12)


def test_bne_root_uses_distances_instead_of_squares():
    net, x = embedded(), data(4, 9)
    _, squared = BNE(net).eval()(x)
    _, rooted = BNE(net, root=True).eval()(x)
    torch.testing.assert_close(rooted, squared.sqrt() / squared.sqrt().sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_bne_assigns_sample_with_equal_statistics_to_domain():
    net, x = embedded(), data(1, 30, shift=6.0)
    set_domain(net, 2)

    def copy_statistics(path, value):
        flat, layer = value[0].flatten(1), net.get_submodule(path)
        layer.domain_mean[2], layer.domain_var[2] = flat.mean(1), flat.var(1, correction=0)

    with torch.no_grad(), capture_inputs(domain_layers(net), copy_statistics):
        net(x)
    _, weights = BNE(net).eval()(x)
    assert float(weights[0, 2]) > 1 - 1e-3


@given(st.permutations(range(3)))
def test_bne_weights_sum_to_one_and_follow_permutations(order):
    net, x = embedded(), data()
    log_p, weights = BNE(net).eval()(x)
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0)
    for layer in domain_layers(net).values():
        layer.domain_mean.copy_(layer.domain_mean[order].clone())
        layer.domain_var.copy_(layer.domain_var[order].clone())
    permuted_log_p, permuted = BNE(net).eval()(x)
    torch.testing.assert_close(permuted, weights[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted_log_p, log_p, rtol=1e-10, atol=1e-10)


def test_bne_weights_domains_with_equal_statistics_equally():
    net = embedded()
    for layer in domain_layers(net).values():
        layer.domain_mean[2] = layer.domain_mean[0]
        layer.domain_var[2] = layer.domain_var[0]
    _, weights = BNE(net).eval()(data())
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert not torch.allclose(weights[:, 0], weights[:, 1])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=2), st.lists(st.floats(0, 5), min_size=2, max_size=2))
def test_distance_is_a_metric(means, stds):
    a, b = (tuple(torch.tensor([[m], [s**2]], dtype=torch.float64)) for m, s in zip(means, stds, strict=True))
    expected = (means[0] - means[1]) ** 2 + (stds[0] - stds[1]) ** 2
    assert float(distance(*a, *b)) == pytest.approx(expected, abs=1e-9)
    assert float(distance(*a, *b)) == float(distance(*b, *a))
    assert float(distance(*a, *a)) == 0
    if expected > 1e-6:
        assert float(distance(*a, *b)) > 0


def test_distance_is_squared_w2_of_moments():
    one, two = Moments.of(data(3).flatten(1)), Moments.of(data(4, 2).flatten(1) * 2)
    actual = distance(one.mean, one.variance(), two.mean, two.variance())
    assert float(actual) == pytest.approx(float(one.w2(two)) ** 2)


def test_domain_norm_shares_parameters_and_has_k_statistics():
    net, plain = convert(network(), "bne", domains=4), network()
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    layer = net.features[1]
    statistics = [k for k, r in roles(net).items() if r is Role.STATISTICS and k.startswith("features.1.")]
    assert sum(net.state_dict()[k].numel() for k in statistics) == 2 * 4 * layer.num_features
    assert list(statistics_layers(net)) == list(statistics_layers(plain))
    assert set(statistics_of(net)) == {f"features.{i}.domain_{s}" for i in (1, 5) for s in ("mean", "var")}


def test_bne_training_updates_one_branch_with_gradients_in_all():
    net = embedded()
    before = {p: (m.domain_mean.clone(), m.domain_var.clone()) for p, m in domain_layers(net).items()}
    log_p, _ = BNE(net).train()(data(8, 4), domain=1)
    F.nll_loss(log_p, torch.zeros(8, dtype=torch.long)).backward()
    assert all(float(p.grad.abs().sum()) > 0 for n, p in net.named_parameters() if n != "classifier.bias")
    for path, layer in domain_layers(net).items():
        assert not torch.equal(layer.domain_mean[1], before[path][0][1])
        for d in (0, 2):
            assert torch.equal(layer.domain_mean[d], before[path][0][d])
            assert torch.equal(layer.domain_var[d], before[path][1][d])


def test_register_turns_client_statistics_into_domains():
    clients = []
    for seed in range(2):
        net = network()
        net.train()(data(30, seed, shift=seed))
        clients.append({k: v.clone() for k, v in statistics_of(net).items()})
    net = register(network(), clients)
    for d, client in enumerate(clients):
        plain = network()
        plain.load_state_dict(plain.state_dict() | client)
        set_domain(net, d)
        torch.testing.assert_close(net.eval()(data()), plain.eval()(data()), rtol=0, atol=0)


def test_convert_copies_statistics_to_every_domain():
    plain = network()
    plain.train()(data(30))
    net = convert(copy.deepcopy(plain), "bne", domains=2)
    for d in (0, 1):
        set_domain(net, d)
        assert torch.equal(net.eval()(data()), plain.eval()(data()))


def test_recalibrate_changes_only_the_current_domain():
    net, plain, x = embedded(), network(), data(40)
    set_domain(net, 1)
    others = [m.domain_mean[0].clone() for m in domain_layers(net).values()]
    recalibrate(net, x)
    recalibrate(plain, x)
    for path, layer in domain_layers(net).items():
        torch.testing.assert_close(layer.running_var, plain.get_submodule(path).running_var, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, m.domain_mean[0]) for a, m in zip(others, domain_layers(net).values(), strict=True))


def test_bne_rejects_bad_input():
    rejects("at least one domain, not domains=0", DomainNorm, 2, domains=0)
    net = nn.Sequential(nn.BatchNorm1d(2, momentum=None))
    rejects("give the model's BN layers a momentum, e.g. 0.1", convert, net, "bne", domains=2)
    rejects(r"convert\(model, 'bne', domains=K\)", BNE, network())
    rejects("unknown domain 3: the model has 3 domains, counted from 0", set_domain, embedded(), 3)
    rejects("batches of one domain: pass it as", lambda: BNE(embedded()).train()(data()))
    flat = convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "bne", domains=2)
    rejects("no domain-specific layer has any: use a convolutional model", lambda: BNE(flat).eval()(torch.zeros(2, 2)))
