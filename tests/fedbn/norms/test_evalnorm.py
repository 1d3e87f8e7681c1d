"""EvalNorm and example weighing: exact conditional expectations, limiting cases, unchanged training."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbn.models.small_cnn import SmallCNN
from fedbn.nn.conversion import convert
from fedbn.norms.evalnorm import EvalNorm, instance_statistics
from fedbn.norms.iew import ExampleWeighing
from tests.fedbn.helpers import bn_eval, draw, rejects, trained


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 3)])
def test_evalnorm_converges_to_bn_for_large_batches(shape):
    x = draw(*shape)
    for rule in ("1/M", "1/M^2"):
        layers = [trained(EvalNorm(3, size=size, rule=rule)).eval() for size in (1e3, 1e6, 1e15)]
        errors = [float((layer(x) - bn_eval(layer, x)).detach().abs().max()) for layer in layers]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-12


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3, 2, 3)])
def test_evalnorm_with_size_one_is_instance_norm(shape):
    layer, x = trained(EvalNorm(3, size=1)).eval(), draw(*shape)
    expected = F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_evalnorm_uses_conditional_expectations(size):
    """Samples with different means and variances; batches of one fixed and random other samples."""
    g = torch.Generator().manual_seed(0)
    population = torch.randn(4000, 6, generator=g, dtype=torch.float64) * (0.5 + torch.rand(4000, 1, generator=g))
    population = population + torch.randn(4000, 1, generator=g, dtype=torch.float64)
    sample = torch.full((6,), 3.0, dtype=torch.float64) + population[0]

    def batch_moments(fixed, n=150_000):
        rows = population[torch.randint(4000, (n, size), generator=g)]
        if fixed is not None:
            rows[:, 0] = fixed
        return rows.flatten(1).mean(1).mean(), rows.flatten(1).var(1, correction=0).mean()

    mu, v = batch_moments(None)
    layer = EvalNorm(1, size=size, affine=False).double().eval()
    layer.running_mean.copy_(mu)
    layer.running_var.copy_(v * (6 * size) / (6 * size - 1))  # as PyTorch would store it
    expected_mean, expected_var = batch_moments(sample)
    y = layer(sample.view(1, 1, 6)).flatten()
    slope = float((y[1] - y[0]) / (sample[1] - sample[0]))  # 1 / sqrt(v_i + eps)
    v_i = slope**-2 - layer.eps
    mu_i = float(sample[0] - y[0] / slope)
    assert mu_i == pytest.approx(float(expected_mean), rel=0.01)
    assert v_i == pytest.approx(float(expected_var), rel=0.01)
    assert abs(float(v) - float(expected_var)) > 0.05  # running statistics alone differ


def test_evalnorm_bounds_pairs_without_positions():
    layer, x = EvalNorm(1, size=2, affine=False).double().eval(), draw(50, 1) * 100
    layer.running_mean.fill_(-3.0)
    layer.running_var.fill_(0.5)
    assert 0.99 < float(layer(x).abs().max()) < 1


@given(st.just(0.0) | st.floats(0.001, 1), st.integers(0, 10**6))
def test_example_weighing_matches_evalnorm(w, seed):
    x = draw(4, 3, 5, seed=seed)
    weighing = trained(ExampleWeighing(3, w=w), seed).eval()
    mean, var = weighing.running_mean, weighing.running_var
    m, s2 = instance_statistics(x)
    first = (1 - w) * mean + w * m
    second = (1 - w) * (var + mean**2) + w * (s2 + m**2)
    normalized = (x - first[..., None]) / torch.sqrt(second - first**2 + weighing.eps)[..., None]
    expected = normalized * weighing.weight[:, None] + weighing.bias[:, None]
    torch.testing.assert_close(weighing(x), expected, rtol=1e-9, atol=1e-9)
    if w > 0:
        # Example weighing uses the total variance, EvalNorm the expected biased one: undo its factor n - 1.
        norm = trained(EvalNorm(3, size=1 / w), seed).eval()
        n = 5 / w
        norm.running_var.mul_(n / (n - 1))
        torch.testing.assert_close(weighing(x), norm(x), rtol=1e-9, atol=1e-9)


def test_example_weighing_averages_moments():
    layer, data = ExampleWeighing(3, momentum=0.3).double(), [draw(6, 3, 2, seed=i) * (1 + i) for i in range(5)]
    first, second = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x in data:
        y = layer(x)
        torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True), rtol=1e-12, atol=1e-12)
        rows = x.transpose(0, 1).flatten(1)
        first, second = 0.7 * first + 0.3 * rows.mean(1), 0.7 * second + 0.3 * (rows**2).mean(1)
    torch.testing.assert_close(layer.running_mean, first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, second - first**2, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", ["1/M", "1/M^2", "learned"])
def test_evalnorm_training_is_exactly_batch_norm(rule):
    torch.manual_seed(0)
    plain = SmallCNN((1, 8, 8), 10)
    converted = convert(copy.deepcopy(plain), "evalnorm", rule=rule)
    plain = convert(plain, "batch")
    x, y = torch.randn(24, 1, 8, 8), torch.randint(10, (24,))
    for net in (plain, converted):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for i in range(0, 24, 4):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i : i + 4]), y[i : i + 4]).backward()
            optimizer.step()
            if net is converted:  # evaluation in between changes nothing
                net.eval()(x)
                net.train()
    state = converted.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), key
    assert float(converted.features[1].running_size) == 4
    assert not torch.allclose(plain.eval()(x), converted.eval()(x))


@pytest.mark.parametrize("layer", [EvalNorm(3, size=4), ExampleWeighing(3, w=0.3)])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4)])
def test_evaluation_is_independent_per_sample(layer, shape):
    layer, x = trained(layer).eval(), draw(*shape)
    batched = layer(x)
    for i in range(6):
        torch.testing.assert_close(layer(x[i : i + 1]), batched[i : i + 1], rtol=1e-14, atol=1e-14)


def test_evalnorm_halves_gap_between_training_and_evaluation():
    """Expected normalized value of a sample over its possible batches: with 1/M the gap is halved."""
    samples, size = draw(80, 1, 8) + draw(80, 1, 1, seed=1) * 2, 2
    g = torch.Generator().manual_seed(2)
    layer = EvalNorm(1, momentum=None, affine=False).double()
    expected, rounds = torch.zeros(80, 8, dtype=torch.float64), 150
    for _ in range(rounds):
        for rows in torch.randperm(80, generator=g).split(size):
            expected[rows] += layer(samples[rows]).squeeze(1) / rounds
    layer.eval()
    gap = (layer(samples).squeeze(1) - expected).abs().mean()
    plain = (bn_eval(layer, samples).squeeze(1) - expected).abs().mean()
    assert float(gap) < 0.5 * float(plain)


@pytest.mark.slow
def test_evalnorm_learns_one_over_m():
    g, learned = torch.Generator().manual_seed(0), {}
    for size in (2, 8):
        layer = EvalNorm(4, rule="learned", affine=False).double()
        for _ in range(800):
            x = torch.randn(size, 4, 5, generator=g, dtype=torch.float64)
            layer(x + torch.randn(size, 4, 1, generator=g, dtype=torch.float64))
        a, b = layer.weights()
        assert float(a) == pytest.approx(1 / size, rel=0.3)
        assert a.grad_fn is None
        learned[size] = float(b)
    assert 0 < learned[8] < learned[2] < 1


def test_evalnorm_records_batch_size():
    layer = EvalNorm(1)
    for rows in (4, 4, 14):
        layer(torch.randn(rows, 1))
    assert float(layer.running_size) == pytest.approx(0.9 * 4 + 0.1 * 14)
    assert layer.weights() == pytest.approx((0.2, 0.2))
    assert EvalNorm(1, rule="1/M^2", size=4).weights() == (1 / 16, 1 / 16)


def test_evalnorm_needs_size_only_after_training():
    x, net = draw(4, 3, 5).float(), nn.Sequential(nn.BatchNorm1d(3))
    fresh = convert(copy.deepcopy(net), "evalnorm").eval()
    torch.testing.assert_close(fresh(x), net.eval()(x))
    net.train()(x)
    trained_elsewhere = convert(copy.deepcopy(net), "evalnorm").eval()
    rejects("trained without recording the rows M of a batch; give size=M, or train on", trained_elsewhere, x)
    assert convert(copy.deepcopy(net), "evalnorm", size=4).eval()(x).isfinite().all()


def test_evalnorm_rejects_bad_input():
    rejects("at least one row, not size=0", EvalNorm, 2, size=0)
    rejects("a weight from 0 to 1, not w=1.5", ExampleWeighing, 2, w=1.5)
