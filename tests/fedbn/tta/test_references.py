"""Methods against slow references from the papers' formulas, in float64, on small unequal blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedbn.tta.base import Adapter, method, methods

CHANNELS, LENGTH, CLASSES = 3, 5, 4
CAPACITY = 6


def network(seed=0, sharp=3.0):
    """A convolution, BN and a linear classifier, confident on some windows only."""
    torch.manual_seed(seed)
    bn = nn.BatchNorm1d(CHANNELS)
    net = nn.Sequential(nn.Conv1d(2, CHANNELS, 3), bn, nn.ReLU(), nn.Flatten(), nn.Linear(CHANNELS * LENGTH, CLASSES))
    net = net.double().eval()
    with torch.no_grad():
        for t, low in ((bn.running_mean, -0.3), (bn.running_var, 0.4), (bn.weight, 0.5), (bn.bias, -0.4)):
            t.uniform_(low, low + 0.7)
        net[4].weight.mul_(sharp)
    return net


def windows(n, seed=1):
    x = torch.randn(n, 2, LENGTH + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None, None] + 0.3


def in_blocks(text, net, blocks, source=None):
    """Predictions of a method for consecutive blocks."""
    adapter = Adapter(method(text), net, windows(10, seed=5) if source is None else source)
    return torch.cat([adapter(x) for x in blocks])


def affine(net):
    return [p.detach().clone().requires_grad_() for p in (net[1].weight, net[1].bias)]


def forward(net, x, scale, shift, mean=None, var=None):
    """Logits with the given scale and shift, normalized by the given statistics or those of the batch."""
    h = net[0](x)
    mean, var = (h.mean((0, 2)), h.var((0, 2), correction=0)) if mean is None else (mean, var)
    mean, var = (t.view(-1, CHANNELS, 1) for t in (mean, var))
    h = (h - mean) / (var + net[1].eps).sqrt() * scale[:, None] + shift[:, None]
    return net[4](h.relu().flatten(1))


def entropies(logits):
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)


class Momentum:
    """SGD with momentum 0.9."""

    def __init__(self, rate):
        self.rate, self.velocity = rate, None

    def __call__(self, theta, gradient):
        old = [torch.zeros_like(g) for g in gradient] if self.velocity is None else self.velocity
        self.velocity = [0.9 * v + g for v, g in zip(old, gradient)]
        return [(t - self.rate * v).detach().requires_grad_() for t, v in zip(theta, self.velocity)]


def adam(theta, gradient, rate):
    """The first step of Adam."""
    return [(t - rate * g / (g.abs() + 1e-8)).detach() for t, g in zip(theta, gradient)]


def up_the_slope(theta, gradient, rho):
    norm = sum((g**2).sum() for g in gradient).sqrt()
    return [(t + rho * g / (norm + 1e-12)).detach().requires_grad_() for t, g in zip(theta, gradient)]


# ---------------------------------------------------------------- SAR


def sar(net, blocks, rate, collapse):
    """Predictions; and for each block the number of reliable windows at the parameters and up the slope, and resets."""
    theta, step, average, margin, out, used = affine(net), Momentum(rate), None, 0.4 * math.log(CLASSES), [], []
    for x in blocks:
        logits = forward(net, x, *theta)
        out.append(logits)
        h = entropies(logits)
        first = [i for i in range(len(x)) if h[i] < margin]
        gradient = [torch.zeros_like(t) for t in theta]
        second = []
        if first:
            gradient = torch.autograd.grad(sum(h[i] for i in first) / len(first), theta)
            upper = up_the_slope(theta, gradient, 0.05)
            h = entropies(forward(net, x, *upper))
            second = [i for i in first if h[i] < margin]
            gradient = [torch.zeros_like(t) for t in theta]
            if second:
                loss = sum(h[i] for i in second) / len(second)
                gradient = torch.autograd.grad(loss, upper)
                average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        theta = step(theta, gradient)
        used.append((len(first), len(second), average is not None and average < collapse))
        if used[-1][2]:
            theta, step, average = affine(net), Momentum(rate), None
    return torch.cat(out), used


@pytest.mark.parametrize(("seed", "collapse"), [(1, 0.0), (0, 0.35)])
def test_sar_matches_formula(seed, collapse):
    net, blocks = network(seed, sharp=4.0), windows(43).flip(0).split([8, 9, 7, 4, 5, 10])
    expected, used = sar(net, blocks, 0.3, collapse)
    actual = in_blocks(f"sar:lr=0.3:collapse={collapse}", net, blocks)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-10)
    counts = [count[:2] for count in used]
    assert all(first < len(x) for (first, _), x in zip(counts, blocks))
    if not collapse:  # one window is reliable, none is any more up the slope, and none is after a step
        assert {(1, 1), (1, 0)} <= {*counts}
        assert (0, 0) in counts[counts.index((2, 2)) :]
    assert any(reset for _, _, reset in used) is (collapse > 0)


@pytest.mark.parametrize(("block", "rate"), [(4, 0.00025 / 64 * 4 * 2), (16, 0.00025 / 64 * 16 * 2), (32, 0.00025)])
def test_sar_rate_is_the_published_one(block, rate):
    net, blocks = network(), windows(3 * block).split(block)
    torch.testing.assert_close(
        in_blocks(f"sar:block={block}", net, blocks), sar(net, blocks, rate, 0.2)[0].detach(), rtol=1e-12, atol=1e-12
    )


# ---------------------------------------------------------------- EATA


def eata(net, blocks, source, rate, d, beta):
    theta, step, average, e0, out = affine(net), Momentum(rate), None, 0.4 * math.log(CLASSES), []
    start, used = [t.detach() for t in theta], []
    fisher = [torch.zeros_like(t) for t in theta]
    for rows in source.split(64):  # Fisher information, with the model's own labels
        log_p = forward(net, rows, *theta).log_softmax(1)
        loss = -sum(row.max() for row in log_p) / len(rows)
        fisher = [f + g**2 / len(source.split(64)) for f, g in zip(fisher, torch.autograd.grad(loss, theta))]
    for x in blocks:
        logits = forward(net, x, *theta)
        out.append(logits)
        h, p = entropies(logits), logits.softmax(1).detach()
        rows = [i for i in range(len(x)) if h[i] < e0]
        if average is not None:
            rows = [i for i in rows if abs(p[i] @ average) / (p[i].norm() * average.norm()) < d]
        used.append(len(rows))
        if not rows:
            continue
        average = p[rows].mean(0) if average is None else 0.9 * average + 0.1 * p[rows].mean(0)
        loss = sum(math.exp(e0 - h[i].item()) * h[i] for i in rows) / len(rows)
        loss = loss + beta * sum((f * (t - s) ** 2).sum() for f, t, s in zip(fisher, theta, start))
        theta = step(theta, torch.autograd.grad(loss, theta))
    return torch.cat(out).detach(), used


def test_eata_matches_formula_with_the_published_setting():
    assert (methods()["eata"]().lr, methods()["eata"]().redundant, methods()["eata"]().fisher) == (0.005, 0.4, 1.0)
    net, blocks, source = network(1, sharp=4.0), windows(48).split([9, 7, 15, 17]), windows(70, seed=8)
    expected, used = eata(net, blocks, source, 0.005, 0.4, 1.0)
    assert min(used) > 0
    torch.testing.assert_close(in_blocks("eata", net, blocks, source), expected, rtol=1e-10, atol=1e-10)
    expected, _ = eata(net, blocks, source, 0.1, 0.7, 2000.0)
    other = in_blocks("eata:lr=0.1:redundant=0.7:fisher=2000", net, blocks, source)
    torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- methods with a memory


@pytest.mark.parametrize("text", ["note:lr=0.05", "sotta:lr=0.05:confident=0.6"])
def test_steps_with_a_memory_do_not_depend_on_blocks(text):
    net, x = network(), windows(41)
    single = in_blocks(f"{text}:capacity={CAPACITY}", net, x.split(1))
    for sizes in ([4] * 10 + [1], [20, 21], [41], [7, 1, 33]):
        blocks = in_blocks(f"{text}:capacity={CAPACITY}", net, x.split(sizes))
        torch.testing.assert_close(blocks, single, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(single[CAPACITY:], net(x[CAPACITY:]).detach(), atol=1e-2)


def iabn(net, x, scale, shift, mean, var, k):
    """IABN: each window's statistics, where they are more than k standard errors from the given ones."""
    h, rows = net[0](x), []
    for window in h:
        m, v = window.mean(1), window.var(1)
        limit, error = k * ((var + net[1].eps) / LENGTH).sqrt(), k * (var + net[1].eps) * math.sqrt(2 / (LENGTH - 1))
        mu = mean + (m - mean - limit).relu() - (mean - m - limit).relu()
        v = (var + (v - var - error).relu() - (var - v - error).relu()).relu()
        rows.append((window - mu[:, None]) / (v + net[1].eps).sqrt()[:, None] * scale[:, None] + shift[:, None])
    return net[4](torch.stack(rows).relu().flatten(1))


def test_note_matches_formula():
    net, x, k, m, theta = network(), windows(11), 1.0, 0.01, affine(network())
    mean, var = net[1].running_mean, net[1].running_var
    first = iabn(net, x[:CAPACITY], *theta, mean, var, k)
    h = net[0](x[:CAPACITY]).transpose(0, 1).flatten(1)  # the memory has all windows so far
    loss = entropies(iabn(net, x[:CAPACITY], *theta, h.mean(1), h.var(1), k)).mean()
    theta = adam(theta, torch.autograd.grad(loss, theta), 0.05)
    mean, var = (1 - m) * mean + m * h.mean(1), (1 - m) * var + m * h.var(1)
    expected = torch.cat([first, iabn(net, x[CAPACITY:], *theta, mean, var, k)])
    actual = in_blocks(f"note:lr=0.05:k={k}:capacity={CAPACITY}", net, x.split([4, 5, 2]))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stored", [0, 1, 3])
def test_sotta_matches_formula(stored):
    net, x, m, theta = network(), windows(11), 0.2, affine(network())
    mean, var = net[1].running_mean, net[1].running_var
    first = forward(net, x[:CAPACITY], *theta, mean, var)
    confidence = first.softmax(1).amax(1).detach()
    threshold = float(confidence.sort().values[-stored]) if stored else 1.1
    memory = x[:CAPACITY][confidence >= threshold]
    assert len(memory) == stored
    if stored:
        h = net[0](memory).transpose(0, 1).flatten(1)
        gradient = torch.autograd.grad(entropies(forward(net, memory, *theta)).mean(), theta)
        upper = up_the_slope(theta, gradient, 0.05)
        theta = adam(theta, torch.autograd.grad(entropies(forward(net, memory, *upper)).mean(), upper), 0.05)
        for _ in range(2):  # both forward passes update the running statistics
            mean, var = (1 - m) * mean + m * h.mean(1), (1 - m) * var + m * h.var(1)
    expected = torch.cat([first, forward(net, x[CAPACITY:], *theta, mean, var)])
    actual = in_blocks(f"sotta:lr=0.05:confident={threshold}:capacity={CAPACITY}", net, x.split([4, 5, 2]))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-9)


def cstu(memory, window, label, h, capacity):
    """Offer a window to a memory of [window, class, entropy, age]."""

    def score(item):
        return 1 / (1 + math.exp(-item[3] / capacity)) + item[2] / math.log(CLASSES)

    counts = [sum(item[1] == c for item in memory) for c in range(CLASSES)]
    new, worst, add = [window, label, h, 0], None, True
    if counts[label] >= capacity / CLASSES:
        worst = max((item for item in memory if item[1] == label), key=score)
    elif len(memory) >= capacity:
        worst = max((item for item in memory if counts[item[1]] == max(counts)), key=score)
    if worst is not None:
        add = score(worst) > score(new)
        if add:
            memory[:] = [item for item in memory if item is not worst]
    memory.extend([new] if add else [])
    for item in memory:
        item[3] += 1


def test_rotta_matches_formula(monkeypatch):
    monkeypatch.setattr("fedbn.tta.rotta.augment", lambda x, draw, strength: 1.1 * x)
    net, blocks, nu, rate = network(), windows(20).split([4, 5, 2, 9]), 0.3, 0.05
    student, teacher, memory, seen, out = affine(net), affine(net), [], 0, []
    statistics = dict.fromkeys(("student", "teacher"), (net[1].running_mean, net[1].running_var))
    moments = [torch.zeros(CHANNELS).double() for _ in range(4)]
    steps = 0

    def robust(name, x, theta):
        h = net[0](x).transpose(0, 1).flatten(1)
        old = statistics[name]
        new = 0.95 * old[0] + 0.05 * h.mean(1), 0.95 * old[1] + 0.05 * h.var(1, correction=0)
        statistics[name] = tuple(t.detach() for t in new)
        return forward(net, x, *theta, *new)

    for block in blocks:
        logits = forward(net, block, *teacher, *statistics["teacher"])  # a block is predicted before it is stored
        out.append(logits.detach())
        for window, row in zip(block, logits.detach()):
            cstu(memory, window, int(row.argmax()), float(entropies(row[None])), CAPACITY)
            seen += 1
            if seen % CAPACITY == 0:
                steps += 1
                x = torch.stack([item[0] for item in memory])
                target = robust("teacher", x, teacher).softmax(1).detach()
                log_p = robust("student", 1.1 * x, student).log_softmax(1)
                ages = [item[3] / CAPACITY for item in memory]
                weights = [math.exp(-a) / (1 + math.exp(-a)) for a in ages]
                loss = sum(w * -(t @ p) for w, t, p in zip(weights, target, log_p)) / len(x)
                for i, g in enumerate(torch.autograd.grad(loss, student)):  # Adam
                    moments[i] = 0.9 * moments[i] + 0.1 * g
                    moments[2 + i] = 0.999 * moments[2 + i] + 0.001 * g**2
                    unbiased = moments[i] / (1 - 0.9**steps), (moments[2 + i] / (1 - 0.999**steps)).sqrt()
                    student[i] = (student[i] - rate * unbiased[0] / (unbiased[1] + 1e-8)).detach().requires_grad_()
                    teacher[i] = ((1 - nu) * teacher[i] + nu * student[i]).detach().requires_grad_()
    assert steps == 3
    actual = in_blocks(f"rotta:lr={rate}:nu={nu}:capacity={CAPACITY}", net, blocks)
    torch.testing.assert_close(actual, torch.cat(out), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["note", "sotta"])
def test_memory_of_one_window_without_positions_takes_no_step(name):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, CLASSES)).double().eval()
    x = torch.randn(5, 2, dtype=torch.float64)
    options = ":confident=0" if name == "sotta" else ""
    out = in_blocks(f"{name}:capacity=1{options}", net, x.split(2), x)
    torch.testing.assert_close(out, net(x).detach())
