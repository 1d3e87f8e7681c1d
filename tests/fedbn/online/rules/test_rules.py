"""Every rule against a slow reference from the paper's formula, window by window."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers
from fedbn.online import LayerPrior, personalize, population_prior, rule, source_prior
from fedbn.online.rules.base import client_rule, rules
from fedbn.online.statistics import Prior, mix
from fedbn.plugins import render

C, L, K = 3, 7, 4
EPS = 1e-5


def layer(channels=C):
    """BN only, so that the output shows the current statistics."""
    torch.manual_seed(0)
    bn = nn.BatchNorm1d(channels, affine=False).double()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.3, 3)
    return nn.Sequential(bn, nn.Flatten()).eval()


def windows(n=12, length=L, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, C, length, generator=draw, dtype=torch.float64) * 2 + torch.randn(n, C, 1, generator=draw) * 3
    p = (torch.randn(n, K, generator=draw, dtype=torch.float64) * 3).softmax(1)
    return x, p


def feed(net, x):
    """Personalized model after windows of user 1."""
    for row in x:
        net(row[None], user=1)
    return net


def priors(model):
    """Prior with class-conditional moments and weights."""
    draw = torch.Generator().manual_seed(5)
    bn = model[0]
    return {
        "0": LayerPrior(
            bn.running_mean.clone(),
            bn.running_var.clone(),
            alpha=torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
            class_mean=torch.randn(K, C, generator=draw, dtype=torch.float64),
            class_var=torch.rand(K, C, generator=draw, dtype=torch.float64) + 0.5,
        )
    }


N0 = 1.5
"""Weight of a prior with its own ``n0``, in windows."""


def prior_of(name, model):
    if name.startswith("population"):
        return {"0": replace(priors(model)["0"], n0=torch.full((C,), N0, dtype=torch.float64))}
    return priors(model) if name.split(":")[0] in ("ttn", "class-residual", "class-mixture") else None


# ---------------------------------------------------------------- references
# Each yields the mean and variance that normalize each window, as arrays over channels.


def moments(w):
    return w.mean(1), w.var(1)


def source(mu0, v0, xs, ps):
    for _ in xs:
        yield mu0, v0


def pseudo(mu0, v0, xs, ps, n0, cap=2000):
    """All values so far and n0 windows of the source."""
    for t in range(len(xs)):
        assert t <= cap
        yield _union(mu0, v0, n0, xs[:t])


def cumulative(mu0, v0, xs, ps):
    for t in range(len(xs)):
        yield _union(mu0, v0, 0 if t else 1, xs[:t])


def _union(mu0, v0, n0, windows):
    total = n0 + len(windows)
    mean = (n0 * mu0 + sum(w.mean(1) for w in windows)) / total
    second = n0 * (v0 + (mu0 - mean) ** 2) + sum(np.mean((w - mean[:, None]) ** 2, 1) for w in windows)
    return mean, second / total


def weighted(mu0, v0, xs, ps, rate, includes_current):
    """Explicit exponential weights a(1-a)^(T-1-i), and (1-a)^T for the source."""
    for t in range(len(xs)):
        past = xs[: t + 1] if includes_current else xs[:t]
        T = len(past)
        share = [(1 - rate) ** T] + [rate * (1 - rate) ** (T - 1 - i) for i in range(T)]
        parts = [(mu0, v0), *map(moments, past)]
        mean = sum(s * m for s, (m, _) in zip(share, parts))
        yield mean, sum(s * (v + (m - mean) ** 2) for s, (m, v) in zip(share, parts))


def torch_momentum(mu0, v0, xs, ps, gain, after=lambda m, v: (m, v)):
    """Running statistics of a BatchNorm in training mode with one window per call."""
    bn = nn.BatchNorm1d(C, affine=False).double()
    mean, var = mu0, v0
    for t, w in enumerate(xs):
        bn.running_mean.copy_(torch.as_tensor(mean))
        bn.running_var.copy_(torch.as_tensor(var))
        yield bn.running_mean.numpy().copy(), bn.running_var.numpy().copy()
        bn.momentum = gain(t)
        bn.train()(torch.as_tensor(w)[None])
        mean, var = after(bn.running_mean.numpy(), bn.running_var.numpy())


def resitta(mu0, v0, xs, ps, rate, leash):
    def pull_back(m, v):
        sd = np.sqrt(v) - 2 * leash * (np.sqrt(v) - np.sqrt(v0))
        return m - 2 * leash * (m - mu0), sd**2

    return torch_momentum(mu0, v0, xs, ps, lambda t: rate, pull_back)


def blend(a, *, cross=False, correction=0):
    def reference(mu0, v0, xs, ps, **_):
        for m, v in ((w.mean(1), w.var(1, ddof=correction)) for w in xs):
            extra = a * (1 - a) * (m - mu0) ** 2 if cross else 0
            yield a * m + (1 - a) * mu0, a * v + (1 - a) * v0 + extra

    return reference


def edtn(mu0, v0, xs, ps):
    for m, v in map(moments, xs):  # a single layer has the source weight of the first, 0.1
        yield 0.9 * m + 0.1 * mu0, (0.9 * np.sqrt(v) + 0.1 * np.sqrt(v0)) ** 2


def membn(mu0, v0, xs, ps, size, n0):
    for t in range(len(xs)):
        yield _union(mu0, v0, n0, xs[max(0, t + 1 - size) : t + 1])


def iabn(mu0, v0, xs, ps, k):
    def soft(d, t):
        return np.copysign(np.maximum(abs(d) - t, 0), d)

    for w in xs:
        mean = mu0 + soft(w.mean(1) - mu0, k * np.sqrt((v0 + EPS) / L))
        var = v0 + soft(w.var(1, ddof=1) - v0, k * (v0 + EPS) * math.sqrt(2 / (L - 1)))
        yield mean, np.maximum(var, 0)


def tema(mu0, v0, xs, ps):
    M, V = mu0, v0
    for t, (m, v) in enumerate(map(moments, xs)):
        a = 1.0 if t == 0 else 0.01
        V = (1 - a) * V + a * v + a * (1 - a) * (m - M) ** 2
        M = (1 - a) * M + a * m
        r = 0.25  # a single layer has z = 0
        yield (1 - r) * M + r * mu0, (1 - r) * V + r * v0 + r * (1 - r) * (M - mu0) ** 2


def unmix(mu0, v0, xs, ps, K_):
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(K_, C, generator=draw, dtype=torch.float64).numpy()
    M = mu0 + math.sqrt(0.5 * K_ / (K_ - 1)) * np.sqrt(v0) * noise
    V = np.tile(0.5 * v0, (K_, 1))
    lam = 1 - 0.9 ** (1 / 64)
    for m, v in map(moments, xs):
        cos = np.array([m @ M[k] / (np.linalg.norm(m) * np.linalg.norm(M[k])) for k in range(K_)]) / 0.07
        p = (np.exp(cos - cos.max()) / np.exp(cos - cos.max()).sum())[:, None]
        Mt, Vt = (1 - p) * M + p * m, (1 - p) * V + p * v
        mu = Mt.mean(0)
        yield mu, Vt.mean(0) + (Mt**2).mean(0) - mu**2
        M += lam * p * (m - M)
        V += lam * p * (v - V)


def balanced(mu0, v0, xs, ps):
    M, V = np.tile(mu0, (K, 1)), np.tile(v0, (K, 1))
    eta = max(0.0005 * K, 0.01)
    for w, p in zip(xs, ps):
        yield mixture(M, V)
        k = int(np.argmax(p))
        d = w - M[k, :, None]
        step = eta * d.mean(1)
        V[k] += eta * ((d**2).mean(1) - V[k]) - step**2
        M[k] += step


def mixture(M, V):
    mu = M.mean(0)
    return mu, V.mean(0) + ((M - mu) ** 2).mean(0)


def _per_class(xs, ps):
    """Weighted count, mean and variance of all values, for each class and channel."""
    if not len(xs):
        return np.zeros(K), np.zeros((K, C)), np.zeros((K, C))
    n = ps.sum(0)
    M = sum(p[:, None] * w.mean(1) for w, p in zip(xs, ps)) / n[:, None]
    V = sum(p[:, None] * np.mean((w - M[:, :, None]) ** 2, 2) for w, p in zip(xs, ps)) / n[:, None]
    return n, M, V


def class_residual(mu0, v0, xs, ps, cm, cv):
    for t in range(len(xs)):
        n, M, _ = _per_class(xs[:t], ps[:t])
        u = n / (n + 4)
        shift = sum(u[k] * (M[k] - cm[k]) for k in range(K)) / (0.5 + u.sum())
        yield mu0 + shift, v0


def class_mixture(mu0, v0, xs, ps, cm, cv):
    mean0, var0 = mixture(cm, cv)
    for t in range(len(xs)):
        n, M, V = _per_class(xs[:t], ps[:t])
        u = (n / (n + 4))[:, None]
        D = M - cm
        shift = (u * D).sum(0) / u.sum() if t else np.zeros(C)
        mean, var = mixture(cm + shift + u * (D - shift), (1 - u) * cv + u * V)
        yield mu0 + mean - mean0, v0 * (var + EPS) / (var0 + EPS)


REFERENCES = {
    "source": source,
    "adabn": source,
    "pseudo:n0=3": partial(pseudo, n0=3),
    "population:bout=2": partial(pseudo, n0=2 * N0),
    "cumulative": cumulative,
    "ema:rate=0.2": partial(weighted, rate=0.2, includes_current=False),
    "ema:rate=0.2:form=within": partial(torch_momentum, gain=lambda t: 0.2),
    "dabn:rate=0.2": partial(weighted, rate=0.2, includes_current=True),
    "dua": partial(torch_momentum, gain=lambda t: 0.1 * 0.94 ** (t + 1) + 0.005),
    "onda": partial(torch_momentum, gain=lambda t: 0.1),
    "resitta:leash=0.03": partial(resitta, rate=0.05, leash=0.03),
    "tbn": blend(1.0),
    "schneider:N=3": blend(1 / 4, correction=1),
    "alpha-bn:alpha=0.3": blend(0.3, correction=1),
    "ttn": blend(np.array([0.1, 0.5, 0.9]), cross=True),
    "edtn": edtn,
    "membn:size=3:n0=2": partial(membn, size=3, n0=2),
    "iabn:k=1.5": partial(iabn, k=1.5),
    "tema": tema,
    "unmix-tns:K=5": partial(unmix, K_=5),
    "balanced": balanced,
    "class-residual": class_residual,
    "class-mixture": class_mixture,
}


def test_every_rule_has_a_reference():
    assert {text.split(":")[0] for text in REFERENCES} == set(rules())


@pytest.mark.parametrize("text", REFERENCES)
def test_rule_matches_reference(text):
    model, (x, p) = layer(), windows()
    prior = prior_of(text, model)
    net = personalize(model, text, prior=prior, classes=K)
    mu0, v0 = model[0].running_mean.numpy(), model[0].running_var.numpy()
    more = (prior["0"].class_mean.numpy(), prior["0"].class_var.numpy()) if text.startswith("class") else ()
    reference = REFERENCES[text](mu0, v0, x.numpy(), p.numpy(), *more)
    for t, (mean, var) in enumerate(reference):
        out = net.predict(x[t : t + 1], user="ann")
        net.commit(posterior=p[t : t + 1])
        expected = (x[t] - torch.as_tensor(mean)[:, None]) / torch.as_tensor(np.sqrt(var + EPS))[:, None]
        torch.testing.assert_close(out[0].view(C, L), expected, rtol=1e-9, atol=1e-9, msg=lambda m, t=t: f"{t}: {m}")
    assert t == len(x) - 1


def test_dabn_recursion_matches_exponential_weights():
    """Mazankiewicz et al.: the variance uses the old mean, and both are updated before use; features [B, C]."""
    model = layer()
    x = torch.randn(300, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2 + 5
    net = personalize(nn.Sequential(model[0]), "dabn:rate=0.07", classes=K)
    M, V, a = model[0].running_mean.clone(), model[0].running_var.clone(), 0.07
    for row in x:
        V = (1 - a) * (V + a * (row - M) ** 2)
        M = (1 - a) * M + a * row
        torch.testing.assert_close(net(row[None], user=1)[0], (row - M) / (V + EPS).sqrt(), rtol=1e-12, atol=1e-12)
    share = torch.tensor([(1 - a) ** 300, *[a * (1 - a) ** (299 - i) for i in range(300)]], dtype=torch.float64)
    values = torch.cat([model[0].running_mean[None], x])
    mean = (share[:, None] * values).sum(0)
    var = (share[:, None] * (values - mean) ** 2).sum(0) + share[0] * model[0].running_var
    torch.testing.assert_close(net.statistics(1)["0"], (mean, var), rtol=1e-12, atol=1e-12)


def test_dabn_with_tiny_rate_matches_source():
    model, (x, _) = layer(), windows(20)
    slow, fast = (personalize(model, f"dabn:rate={a}", classes=K) for a in (1e-9, 0.1))
    frozen = personalize(model, "source", classes=K)
    for row in x:
        torch.testing.assert_close(slow(row[None], user=1), frozen(row[None], user=1), rtol=1e-6, atol=1e-6)
        fast(row[None], user=1)
    assert not torch.allclose(fast.statistics(1)["0"][0], frozen.statistics(1)["0"][0], atol=0.01)


@pytest.mark.slow
def test_dabn_converges_on_stationary_stream():
    model = nn.Sequential(layer()[0])
    x = torch.randn(800, C, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 5
    mean, var = feed(personalize(model, "dabn:rate=0.008", classes=K), x).statistics(1)["0"]
    assert float((mean - 5).abs().max()) < 0.2 < float((model[0].running_mean - 5).abs().max())
    assert float((var - 1).abs().max()) < 0.3


def test_rows_of_one_user_form_a_batch():
    model, (x, _) = layer(), windows(6)
    users = ["a", "b", "a", "a", "b", "a"]
    rows = [0, 2, 3, 5]
    batch = x[rows].transpose(0, 1).flatten(1)
    rules_of_batches = (
        ("tbn", 0.0, 0),
        ("schneider:N=3", 3 / 7, 1),
        ("alpha-bn:alpha=0.3", 0.7, 1),
        ("membn:n0=0", 0.0, 0),
    )
    for text, r, correction in rules_of_batches:
        net = personalize(model, text, classes=K)
        out = net.predict(x, user=users)[rows].view(4, C, L)
        mean = r * model[0].running_mean + (1 - r) * batch.mean(1)
        var = r * model[0].running_var + (1 - r) * batch.var(1, correction=correction)
        torch.testing.assert_close(out, (x[rows] - mean[:, None]) / (var[:, None] + EPS).sqrt())
    net = personalize(model, "onda", classes=K)
    net(x, user=users)
    bn = nn.BatchNorm1d(C, affine=False).double()
    bn.load_state_dict(model[0].state_dict())
    bn.train()(x[rows])
    torch.testing.assert_close(net.statistics("a")["0"], (bn.running_mean, bn.running_var))


def test_single_values_do_not_change_the_variance():
    model = nn.Sequential(layer()[0])
    x = torch.randn(5, C, dtype=torch.float64)
    for text in ("alpha-bn", "schneider"):
        net = personalize(model, text, classes=K)
        net(x[1:], user=[1] * 4)
        out = net.predict(x[:1], user=1)
        share = 0.1 if text == "alpha-bn" else 1 / 17
        expected = (1 - share) * (x[:1] - model[0].running_mean) / (model[0].running_var + EPS).sqrt()
        torch.testing.assert_close(out, expected)
    for text in ("dua", "onda", "resitta", "ema:form=within"):
        net = feed(personalize(model, text, classes=K), x)
        torch.testing.assert_close(net.statistics(1)["0"][1], model[0].running_var)
        assert not torch.allclose(net.statistics(1)["0"][0], model[0].running_mean)


def test_pseudo_discounts_windows_beyond_cap():
    model, (x, _) = layer(), windows(400)
    x[:100] += 1000
    net = feed(personalize(model, "pseudo:n0=1:cap=9", classes=K), x)
    assert net.report(1)["windows"] == 9
    mean = net.statistics(1)["0"][0]
    weights = torch.tensor([1 / 9 * (8 / 9) ** (399 - i) for i in range(400)], dtype=torch.float64)
    data = (weights[:, None] * x.mean(2)).sum(0) / weights.sum()
    torch.testing.assert_close(mean, 0.1 * model[0].running_mean + 0.9 * data, rtol=1e-6, atol=1e-6)


def inputs_and_output(net, x):
    """Inputs of the three layers, and the output, for windows of user 1."""
    inputs = []
    with capture_inputs(statistics_layers(net.model), lambda _path, value: inputs.append(value)):
        return *inputs, net.predict(x, user=1)


def test_tema_weighs_source_by_divergence():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Flatten()).double().eval()
    net = personalize(model, "tema:smooth=0", classes=K)
    x = torch.randn(64, 2, 5, dtype=torch.float64) * 3 + 4
    net(x, user=1)  # the input of the first layer is x, that of later ones the remaining shift
    net(x, user=1)
    r = net.bank.rows["extra"][net.bank.slot["1"]][1]
    assert r[0] == r[1] == pytest.approx(0.5)
    assert max(r[2], r[4]) < 0.25
    assert ((r >= 0) & (r <= 0.5)).all()
    *inputs, out = inputs_and_output(net, x[:1] * 2)
    for i, h in enumerate(inputs):  # the weights after the previous batch, not those of this window
        old, share = net.state(1).layers[str(i)], r[2 * i]
        M, V = mix((old.mean, old.variance()), (h.mean(2)[0], h.var(2, correction=0)[0]), h.new_tensor(0.01))
        mean, var = mix((M, V), (torch.zeros(2).double(), torch.ones(2).double()), share)
        expected = (h - mean[:, None]) / (var[:, None] + EPS).sqrt()
        torch.testing.assert_close(inputs[i + 1] if i < 2 else out.view(1, 2, 5), expected)


def test_tema_divergence_is_symmetric_kl_of_gaussians():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Flatten()).double().eval()
    for i, layer in enumerate(list(model)[:3]):
        layer.running_mean += torch.tensor([0.3 * i, -0.7])
        layer.running_var += torch.tensor([0.2, 1.5 * i])
    net = personalize(model, "tema:smooth=0", classes=K)
    net(torch.randn(64, 2, 5, dtype=torch.float64) * 1.3 - 0.8, user=1)
    divergences = []
    for i, layer in enumerate(list(model)[:3]):
        learned = net.state(1).layers[str(i)]
        p, q = (
            torch.distributions.Normal(mean, (var + EPS).sqrt())
            for mean, var in ((learned.mean, learned.variance()), (layer.running_mean, layer.running_var))
        )
        kl = torch.distributions.kl_divergence
        divergences.append(float((kl(p, q) + kl(q, p)).sum()))
    z = (np.array(divergences) - np.mean(divergences)) / np.std(divergences)
    expected = (np.clip(z, -1, 1) + 1) / 4
    r = net.bank.rows["extra"][net.bank.slot["1"]][1]
    np.testing.assert_allclose(r[::2].numpy(), expected, rtol=1e-9)
    assert len(set(expected.tolist())) == 3


def test_edtn_weighs_source_by_depth():
    model = nn.Sequential(*[nn.BatchNorm1d(1, eps=0.0) for _ in range(3)]).double().eval()
    net = personalize(model, "edtn", classes=1)
    x = torch.randn(1, 1, 9, dtype=torch.float64) * 2 + 3
    *inputs, out = inputs_and_output(net, x)
    for r, h, following in zip((0.1, 0.1 * 9.9**0.5, 0.99), inputs, (*inputs[1:], out)):
        mean, sd = (1 - r) * h.mean(), (1 - r) * h.std(correction=0) + r
        torch.testing.assert_close((h - mean) / sd, following)


# ---------------------------------------------------------------- common options


@given(share=st.floats(0, 1), between=st.booleans(), seed=st.integers(0, 99))
def test_mix_has_moments_of_mixture_and_exact_ends(share, between, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = ((torch.randn(3, generator=draw), torch.rand(3, generator=draw)) for _ in range(2))
    for end, pair in ((0.0, a), (1.0, b)):
        assert all(torch.equal(x, y) for x, y in zip(mix(a, b, torch.tensor(end), between=between), pair))
    mean, var = mix(a, b, torch.tensor(share), between=between)
    torch.testing.assert_close(mean, (1 - share) * a[0] + share * b[0])
    second = (1 - share) * (a[1] + (a[0] - mean) ** 2) + share * (b[1] + (b[0] - mean) ** 2)
    torch.testing.assert_close(var, second if between else (1 - share) * a[1] + share * b[1], rtol=1e-5, atol=1e-6)


def fitted(text, n=6, posterior=None, **options):
    model, (x, p) = layer(), windows(n)
    net = personalize(model, text, classes=K, **options)
    for i in range(n):
        net.predict(x[i : i + 1], user=1)
        net.commit(posterior=(p if posterior is None else posterior)[i : i + 1])
    return model, net, x, p


def test_gate_learns_only_from_confident_windows():
    _, p = windows(30)
    confident = p.max(1).values >= 0.8
    assert 5 < confident.sum() < 25
    _, gated, x, _ = fitted("pseudo:gate=0.8", 30)
    plain = feed(personalize(layer(), "pseudo", classes=K), x[confident])
    torch.testing.assert_close(gated.statistics(1)["0"], plain.statistics(1)["0"])
    report = gated.report(1)
    assert (report["offered"], report["learned"]) == (30, int(confident.sum()))


def test_gate_accepts_labeled_windows():
    model, (x, p) = layer(), windows(4)
    net = personalize(model, "pseudo:gate=1", classes=K)
    net.predict(x, user=[1, 2, 3, 4])
    net.commit(posterior=p, label=torch.tensor([2, -1, 0, -1]))
    assert [net.report(u)["learned"] for u in (1, 2, 3, 4)] == [1, 0, 1, 0]
    assert net.state(1).classes.tolist() == [0, 0, 1, 0]


def test_diversity_weighs_statistics_by_class_entropy():
    one = torch.eye(K, dtype=torch.float64)
    model, net, _, _ = fitted("pseudo:diversity=1", 4, one[[1, 1, 1, 1]])
    assert net.report(1)["diversity"] == 0
    assert all(torch.equal(a, b) for a, b in zip(net.statistics(1)["0"], net.statistics("new")["0"]))
    _, net, _, _ = fitted("pseudo:diversity=1", 4, one)
    assert net.report(1)["diversity"] == pytest.approx(1)
    _, plain, _, _ = fitted("pseudo", 4)
    torch.testing.assert_close(net.statistics(1)["0"], plain.statistics(1)["0"])
    for g in (1, 2):
        model, net, _, _ = fitted(f"pseudo:diversity={g}", 4, one[[0, 0, 1, 1]])
        rho = (1 / 3) ** g
        mean, var = plain.statistics(1)["0"]
        m0, v0 = model[0].running_mean, model[0].running_var
        expected = (1 - rho) * m0 + rho * mean, (1 - rho) * v0 + rho * var + rho * (1 - rho) * (mean - m0) ** 2
        torch.testing.assert_close(net.statistics(1)["0"], expected)


def test_floor_and_mean_only_limit_variances():
    model, (x, _) = layer(), windows(3)
    flat = x.mean(2, keepdim=True).expand_as(x)[:1]
    net = personalize(model, "cumulative:floor=0.05", classes=K)
    net(flat, user=1)
    torch.testing.assert_close(net.statistics(1)["0"][1], 0.05 * model[0].running_var)
    net = personalize(model, "cumulative:mean_only=true", classes=K)
    net(x, user=1)
    mean, var = net.statistics(1)["0"]
    torch.testing.assert_close(mean, x.mean((0, 2)))
    assert torch.equal(var, model[0].running_var)


def test_fade_reduces_weight_by_layer():
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(3)]).double().eval()
    x = torch.randn(20, 2, 5, dtype=torch.float64) * 2 + 1
    full, faded = (personalize(model, f"cumulative{o}", classes=1) for o in ("", ":fade=0.5"))
    full(x, user=1)
    faded(x, user=1)
    for i in range(3):
        mean, var = full.statistics(1)[str(i)]
        share = 0.5**i
        expected = share * mean, (1 - share) + share * var + share * (1 - share) * mean**2
        torch.testing.assert_close(faded.statistics(1)[str(i)], expected)


def test_guard_uses_adapted_statistics_at_a_tie():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    net, plain = (personalize(model, f"ema:rate=0.5:guard={g}") for g in ("true", "false"))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for either in (net, plain):
        either(x, user="ann")
    for entropy, prior_entropy, is_adapted in ((0.25, 0.25, True), (0.25, 0.5, True), (0.5, 0.25, False)):
        net.bank.rows["entropy"][:] = entropy
        net.bank.rows["prior_entropy"][:] = prior_entropy
        expected = plain.predict(x, user="ann") if is_adapted else model(x)
        assert torch.equal(net.predict(x, user="ann"), expected)
        assert net.report("ann")["statistics"] == ("adapted" if is_adapted else "prior")
    assert not torch.allclose(plain.predict(x, user="ann"), model(x))


def test_clip_moments_limits_mean_and_variance_by_prior():
    prior = Prior(torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[4.0, 0.25, 9.0]]), torch.zeros(3), 1, torch.zeros(3))
    moments = torch.tensor([[9.0, -9.0, 1.0]]), torch.tensor([[100.0, 100.0, 30.0]])
    mean, var = rule("pseudo:clip=2").clip_moments(prior, moments)
    assert mean.tolist() == [[1 + 2 * 2, -2 - 2 * 0.5, 1.0]]
    assert var.tolist() == [[(2 * 2) ** 2, (2 * 0.5) ** 2, 30.0]]
    assert rule("pseudo").clip_moments(prior, moments) is moments


def test_guard_falls_back_to_prior_when_entropy_rises():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)).eval()
    model.requires_grad_(False)[1].weight.copy_(torch.tensor([[4.0, 0, 0], [-4.0, 0, 0]]))
    net, plain = (personalize(model, f"ema:rate=0.5:guard={g}") for g in ("true", "false"))
    confident = torch.full((1, 3), 3.0)  # a sequence of one class, predicted with confidence until it is centered
    for _ in range(6):
        out, unguarded = net(confident, user=1), plain(confident, user=1)
    assert torch.equal(out, model(confident))
    assert net.report(1)["statistics"] == "prior"
    assert unguarded.softmax(1).max() < 0.99 < out.softmax(1).max()
    far = torch.tensor([[0.05, 0, 0], [-0.05, 0, 0]])  # uncertain under the source, but not at the user's scale
    for _ in range(80):
        out = net(far, user=[1, 1])
    assert net.report(1)["statistics"] == "adapted"
    assert out.softmax(1).max() > model(far).softmax(1).max()


BAD = [f"source:{option}" for option in ("gate=2", "diversity=-1", "fade=1.5", "floor=-0.1", "clip=-1")]
BAD += ["pseudo:n0=-1", "pseudo:cap=0", "ema:rate=2", "dabn:rate=-1", "dua:decay=2", "dua:floor_gain=1", "onda:rate=2"]
BAD += ["schneider:N=-1", "alpha-bn:alpha=2", "edtn:first=0", "edtn:last=2", "membn:size=0", "membn:n0=-1", "iabn:k=-1"]
BAD += ["iabn:effective=2", "tema:smooth=2", "unmix-tns:K=1", "balanced:rate=2", "resitta:rate=2", "resitta:leash=1"]
BAD += ["class-residual:n0=-1", "class-mixture:n0=-1"]


@pytest.mark.parametrize("text", BAD)
def test_rule_options_reject_bad_values(text):
    name, option = text.split(":")
    with pytest.raises(UserError, match=rf"rule '{name}': {option.split('=')[0]}=.* is out of range; use"):
        rule(text)


def test_rule_suggests_similar_name():
    with pytest.raises(UserError, match=r"run fedbn adapt SCENARIO --strategies .* --rules auto"):
        client_rule("auto")
    with pytest.raises(UserError, match="unknown rule or method 'pseudoo'. Did you mean 'pseudo'"):
        rule("pseudoo")
    with pytest.raises(UserError, match="unknown option of rule or method 'pseudo' 'no'. Did you mean 'n0'"):
        rule("pseudo:no=3")


@pytest.mark.parametrize("name", list(rules()))
def test_rule_round_trips_through_text(name):
    value = rule(name)
    assert render(value) == name
    assert rule(render(rule(f"{name}:floor=0.25"))).floor == 0.25
    assert hash(value) == hash(rule(name))
    assert value.about
    assert value.source or name in ("source", "class-residual", "class-mixture")


# ---------------------------------------------------------------- priors


@pytest.mark.parametrize("name", ["ttn", "class-residual", "class-mixture", "population"])
def test_rule_reports_missing_prior(name):
    net = layer()
    with pytest.raises(UserError, match=f"rule '{name}' needs"):
        personalize(net, name, classes=K).predict(windows(2)[0], user=1)


def test_class_rules_learn_shift_from_one_class():
    """Users differ by an offset, classes by their mean: a sequence of one class reveals only the offset."""
    draw = torch.Generator().manual_seed(0)
    center = torch.randn(K, 3, 1, generator=draw) * 4
    y = torch.arange(400) % K
    x = center[y] + torch.randn(400, 3, 16, generator=draw)
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Flatten(), nn.Linear(48, K))
    model(x)
    model.eval()
    prior = source_prior(model, x, y, K)
    offset = torch.tensor([2.0, -1.0, 0.5])
    sequence = center[[1] * 60] + torch.randn(60, 3, 16, generator=draw) + offset[:, None]
    start = model[0].running_mean
    residual = 60 / 64 / (0.5 + 60 / 64)
    for name, factor, tolerance in (("class-residual", residual, 0.25), ("class-mixture", 1.0, 0.1)):
        net = personalize(model, name, prior=prior)
        for row in sequence:
            net.predict(row[None], user=1)
            net.commit(label=torch.tensor([1]))
        shift = net.statistics(1)["0"][0] - start
        torch.testing.assert_close(shift, offset * factor, atol=tolerance, rtol=0.05)
    net = personalize(model, "cumulative")
    net(sequence, user=1)
    assert (net.statistics(1)["0"][0] - start - offset).abs().max() > 1


@pytest.mark.parametrize("name", ["balanced", "class-residual", "class-mixture"])
def test_new_user_of_class_rule_is_bit_equal_to_source(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(30, K))
    model.eval().requires_grad_(False)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.2, 2)
    x = torch.randn(40, 2, 8)
    net = personalize(model, name, prior=source_prior(model, x, torch.arange(40) % K, K))
    assert torch.equal(net.predict(x, user=list(range(40))), model(x))
    net(x, user=[i % 3 for i in range(40)])
    assert torch.equal(net.predict(x, user="new"), model(x))
    assert not torch.allclose(net.predict(x, user=0), model(x))


def test_source_prior_has_moments_of_classes():
    model, (x, _) = layer(), windows(20)
    y = torch.arange(20) % K
    prior = source_prior(model, x, y, K)["0"]
    for k in range(K):
        values = x[y == k].transpose(0, 1).flatten(1)
        torch.testing.assert_close(prior.class_mean[k], values.mean(1))
        torch.testing.assert_close(prior.class_var[k], values.var(1, correction=0))
    with pytest.raises(UserError, match="class 3 of 4 has no example"):
        source_prior(model, x, y % 3, K)


def test_population_prior_estimates_n0_by_channel():
    draw = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)[:, None]
    users = []
    for _ in range(300):
        user = torch.randn(1, 3, 1, generator=draw, dtype=torch.float64) * scale
        window = torch.randn(8, 3, 1, generator=draw, dtype=torch.float64)
        users.append(user + window + torch.randn(8, 3, 6, generator=draw, dtype=torch.float64))
    prior = population_prior(layer(), users)["0"]
    s2 = 1 + 1 / 6
    assert prior.n0[0] > 20
    assert prior.n0[1].item() == pytest.approx(s2 / 0.25, rel=0.35)
    assert prior.n0[2].item() == pytest.approx(s2 / 16, rel=0.25)
    values = torch.cat(users).transpose(0, 1).flatten(1)
    torch.testing.assert_close(prior.mean, values.mean(1))
    torch.testing.assert_close(prior.var, values.var(1, correction=0))
    net = personalize(layer(), "pseudo:n0=999", prior={"0": prior}, classes=K)
    x = users[0][:4]
    net(x, user=1)
    r = prior.n0 / (prior.n0 + 4)
    torch.testing.assert_close(net.statistics(1)["0"][0], r * prior.mean + (1 - r) * x.mean((0, 2)))
    with pytest.raises(UserError, match="two users with two windows each"):
        population_prior(layer(), users[:1])
