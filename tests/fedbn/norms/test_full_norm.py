"""Full normalization: limiting case of BN on all data, error proportional to a, aggregation of states."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.norms.full_norm import FullNorm
from fedbn.strategies.base import Progress, Update
from fedbn.strategies.full_norm import FullNormStrategy
from tests.fedbn.helpers import draw, rejects


@pytest.mark.parametrize("shape", [(9, 3), (4, 3, 5)])
def test_full_norm_on_all_data_is_batch_norm(shape):
    x, gy = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    layer = FullNorm(3, a=1.0).double()
    for _ in range(2):
        y, expected = layer(x), F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for leaf in (x, layer.weight, layer.bias):
            actual, reference = (torch.autograd.grad(out, leaf, gy, retain_graph=True)[0] for out in (y, expected))
            torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-12)


def slow(batches, gys, a, eps=1e-5):
    """Direct implementation of section 6, with second moments."""
    state = None
    for x, gy in zip(batches, gys, strict=True):
        rows, g = x.transpose(0, 1).flatten(1), gy.transpose(0, 1).flatten(1)
        batch = (rows.mean(1), (rows**2).mean(1))
        mu, nu = batch if state is None else [(1 - a) * o + a * n for o, n in zip(state[:2], batch, strict=True)]
        inv = (nu - mu**2 + eps) ** -0.5
        g_var = -0.5 * inv**3 * (g * (rows - mu[:, None])).sum(1)
        grads = (-inv * g.sum(1) - 2 * mu * g_var, g_var)
        G = grads if state is None else [(1 - a) * o + a * n for o, n in zip(state[2:], grads, strict=True)]
        gx = g * inv[:, None] + (G[0][:, None] + 2 * rows * G[1][:, None]) / rows.shape[1]
        y = (rows - mu[:, None]) * inv[:, None]
        state = (mu, nu, *G)
    return y, gx, state


def test_full_norm_matches_formulas_over_several_batches():
    batches, gys = [draw(4, 3, 2, seed=i) for i in range(6)], [draw(4, 3, 2, seed=10 + i) for i in range(6)]
    layer = FullNorm(3, a=0.3, affine=False).double()
    for x, gy in zip(batches, gys, strict=True):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(gy)
    expected, gx, (mu, nu, G_mu, G_nu) = slow(batches, gys, 0.3)
    for actual, reference in (
        (y.transpose(0, 1).flatten(1), expected),
        (leaf.grad.transpose(0, 1).flatten(1), gx),
        (layer.running_mean, mu),
        (layer.running_var, nu - mu**2),
        (layer.running_grad_mean, G_mu),
        (layer.running_grad_second, G_nu),
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-11)
    evaluated = F.batch_norm(batches[0], mu, nu - mu**2)
    torch.testing.assert_close(layer.eval()(batches[0]), evaluated, rtol=1e-10, atol=1e-10)


class Net(nn.Module):
    """Linear, a normalizer, tanh, linear; its weights are constant in the test."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(4, 5), norm, nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def mean_gradient(net, x, y, cycles, skip):
    """Mean gradient of the first layer over cycles of single-class batches."""
    total, count = 0, 0
    for cycle in range(cycles):
        for k in range(3):
            net.zero_grad()
            F.cross_entropy(net(x[y == k]), y[y == k]).backward()
            if cycle >= skip:
                total, count = total + net.first.weight.grad, count + 1
    return total / count


@pytest.mark.slow
def test_full_norm_gradient_error_shrinks_with_a():
    y = torch.arange(3).repeat_interleave(20)
    x = draw(60, 4) + y[:, None].double() * 2
    whole = Net(nn.BatchNorm1d(5))
    F.cross_entropy(whole(x), y).backward()
    target = whole.first.weight.grad

    def error(net, cycles, skip):
        return float((mean_gradient(net, x, y, cycles, skip) - target).norm() / target.norm())

    coarse, fine = (error(Net(FullNorm(5, a=a)), cycles=int(12 / a), skip=int(10 / a)) for a in (0.3, 0.03))
    assert fine < coarse / 5
    assert fine < 0.05
    assert error(Net(nn.BatchNorm1d(5)), 2, 0) > 0.5


def test_full_norm_mean_of_states_is_state_of_union():
    """All four averages are linear in the data, so the mean of the clients' states is the state of the union."""
    start = FullNorm(3, a=0.4).double()
    start(draw(8, 3, seed=5)).sum().backward()

    def client(rows):
        layer = FullNorm(3, a=0.4).double()
        layer.load_state_dict(start.state_dict())
        layer(rows)
        return layer

    parts = [draw(6, 3), draw(6, 3, seed=1) * 3 - 2]
    union = client(torch.cat(parts)).state_dict()
    updates = [Update(i, client(p).state_dict(), 6, 0.0) for i, p in enumerate(parts)]
    keys = [k for k in union if "running" in k or k == "steps"]
    pooled = FullNormStrategy().aggregate_statistics(updates, [6, 6], keys, {}, Progress(1, 1))
    for key in keys:
        torch.testing.assert_close(pooled[key], union[key], rtol=1e-12, atol=1e-12)


def test_full_norm_mean_of_gradients_is_gradient_of_union():
    """Two batches with the same moments, so both clients normalize equally; their losses are batch means."""
    x, gy = draw(6, 3), draw(12, 3, seed=1)
    mirrored = 2 * x.mean(0) - x

    def client(rows, g):
        layer = FullNorm(3, a=0.4, affine=False).double()
        layer(rows.clone().requires_grad_()).backward(g)
        return layer.running_grad_mean, layer.running_grad_second

    union = client(torch.cat([x, mirrored]), gy / 12)
    first, second = client(x, gy[:6] / 6), client(mirrored, gy[6:] / 6)
    for i in (0, 1):
        torch.testing.assert_close((first[i] + second[i]) / 2, union[i], rtol=1e-11, atol=1e-12)


def test_full_norm_trains_on_batch_of_one():
    layer = FullNorm(2, a=0.1)
    out = layer(torch.ones(1, 2, requires_grad=True))
    out.sum().backward()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("a", [0.0, 1.5, -0.1])
def test_full_norm_rejects_bad_weight(a):
    rejects("needs a weight above 0 and at most 1, not a=", FullNorm, 2, a=a)


def test_full_norm_strategy_clips_total_gradient():
    net = nn.Linear(3, 2)
    for p in net.parameters():
        p.grad = torch.full_like(p, 10.0)
    FullNormStrategy(clip=0.5).on_before_optimizer_step(net)
    assert float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm()) == pytest.approx(0.5, rel=1e-4)
