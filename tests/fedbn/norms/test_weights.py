"""Normalization of weights and features instead of activations."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedbn.data.population import Examples
from fedbn.nn.conversion import convert, weighted_layers
from fedbn.nn.roles import Role, norm_layers, roles
from fedbn.norms.feature_norm import FeatureNormLinear, normalize_features
from fedbn.norms.fedwon import GAMMA_RELU, ScaledWeightStandardization, clip_adaptively
from fedbn.norms.weight_norm import initialize
from fedbn.norms.weight_standardization import WeightStandardization
from fedbn.strategies.base import Progress
from fedbn.strategies.fedwon import FedWon
from fedbn.strategies.weight_norm import WeightNorm
from tests.fedbn.helpers import draw, network, rejects


def test_weight_norm_keeps_function_and_ignores_length_of_v():
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)).double()
    x = draw(5, 1, 4, 4)
    before = net(x)
    convert(net, "weight-norm")
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    for layer in (net[0], net[3]):
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        torch.testing.assert_close(g.flatten(), v.flatten(1).norm(dim=1), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            v.mul_(torch.linspace(0.1, 7, len(v)).view(-1, *[1] * (v.dim() - 1)))
    torch.testing.assert_close(net(x), before, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        net[3].parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(net(x), before)


def test_initialize_gives_unit_pre_activations():
    net, x = convert(network(), "weight-norm"), 3 + 5 * draw(40, 1, 8, 8)
    direction = [m.parametrizations.weight.original1.clone() for m in weighted_layers(net).values()]
    initialize(net, x)
    outputs = []
    for layer in weighted_layers(net).values():
        layer.register_forward_hook(lambda _layer, _args, out: outputs.append(out))
    net(x)
    assert len(outputs) == len(weighted_layers(net)) > 2
    for out in outputs:
        var, mean = torch.var_mean(out, [0, *range(2, out.dim())], correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
        varying = var > 1e-9
        assert varying.any()
        torch.testing.assert_close(var[varying], torch.ones_like(var[varying]), rtol=1e-9, atol=0)
    for layer, v in zip(weighted_layers(net).values(), direction, strict=True):
        assert torch.equal(layer.parametrizations.weight.original1, v)


def test_weight_norm_initializes_only_in_first_round():
    strategy, data = WeightNorm(), Examples(draw(6, 1, 8, 8), torch.zeros(6).long(), torch.zeros(6).long())
    first, later = (convert(network(), "weight-norm") for _ in range(2))
    before = copy.deepcopy(later.state_dict())
    strategy.before_local_training(later, data, Progress(2, 3))
    assert all(torch.equal(v, before[k]) for k, v in later.state_dict().items())
    strategy.before_local_training(first, data, Progress(1, 3))
    assert any(not torch.equal(v, before[k]) for k, v in first.state_dict().items())


@given(st.integers(0, 10**6), st.floats(0.1, 100), st.floats(-10, 10))
def test_weight_standardization_ignores_scale_and_shift(seed, c, d):
    w = draw(4, 3, 2, seed=seed)
    standardized = WeightStandardization()(w)
    torch.testing.assert_close(standardized.mean((1, 2)), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(standardized.flatten(1).std(1), torch.ones(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(WeightStandardization()(w * c + d), standardized, rtol=1e-3, atol=1e-3)


def test_weight_standardization_adds_epsilon_to_unbiased_std():
    w = torch.tensor([[[0.0, 2e-5]]], dtype=torch.float64)
    expected = torch.tensor([[[-1e-5, 1e-5]]], dtype=torch.float64) / (2e-5 / 2**0.5 + 1e-5)
    torch.testing.assert_close(WeightStandardization()(w), expected, rtol=1e-9, atol=0)


@given(st.integers(0, 10**6))
def test_scaled_weights_have_length_gamma_times_gain(seed):
    w = draw(4, 3, 2, seed=seed)
    scaled = ScaledWeightStandardization(4, gamma=1.5).double()
    with torch.no_grad():
        scaled.gain.copy_(torch.linspace(0.5, 2, 4))
    out = scaled(w).flatten(1)
    torch.testing.assert_close(out.sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.norm(dim=1), 1.5 * scaled.gain.detach(), rtol=1e-12, atol=1e-12)


def test_scaled_weights_of_constant_filter_stay_finite():
    scaled = ScaledWeightStandardization(1, gamma=1.0)
    tiny = torch.tensor([[[1.0, 1.0 + 1e-3]]])
    torch.testing.assert_close(scaled(tiny), (tiny - tiny.mean()) * 100, rtol=1e-3, atol=1e-6)


def test_scaled_weights_preserve_variance_through_relu():
    torch.manual_seed(0)
    x = torch.relu(torch.randn(4000, 64)) * GAMMA_RELU
    assert float(x.var()) == pytest.approx(1, abs=0.02)
    weight = ScaledWeightStandardization(64, gamma=1.0)(torch.randn(64, 64, 1))[:, :, 0]
    assert float((x @ weight.T).var(0).mean()) == pytest.approx(1, abs=0.05)


@given(st.integers(0, 10**6), st.floats(0.01, 1.28))
def test_clip_adaptively_bounds_only_large_unit_gradients(seed, lam):
    w, b, none = draw(6, 3, 2, seed=seed).requires_grad_(), draw(6).requires_grad_(), draw(2, 2).requires_grad_()
    w.data[0] = 0  # eps replaces its norm
    w.grad = draw(6, 3, 2, seed=seed + 1) * torch.logspace(-4, 2, 6).double().view(6, 1, 1)
    b.grad = draw(6) * 1000
    g, vector_grad = w.grad.clone(), b.grad.clone()
    clip_adaptively([w, b, none], lam, eps=1e-3)
    for i in range(6):
        bound = lam * max(float(w[i].norm()), 1e-3)
        expected = g[i] * (bound / g[i].norm()) if float(g[i].norm()) > bound else g[i]
        torch.testing.assert_close(w.grad[i], expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(b.grad, vector_grad)


def test_clip_adaptively_keeps_zero_gradients():
    w = torch.ones(2, 3, requires_grad=True)
    w.grad = torch.zeros(2, 3)
    clip_adaptively([w], 0.1)
    assert torch.equal(w.grad, torch.zeros(2, 3))


def test_fedwon_clips_all_layers_except_classifier():
    net = convert(network(), "fedwon")
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e3)
    FedWon(clip=0.1).on_before_optimizer_step(net)
    assert float(net.classifier.weight.grad.min()) == 1e3
    for i in (0, 4):
        w = net.features[i].parametrizations.weight.original
        torch.testing.assert_close(w.grad.flatten(1).norm(dim=1), 0.1 * w.detach().flatten(1).norm(dim=1))


def test_normalize_features_gives_length_root_d():
    x = draw(7, 5) * torch.logspace(-3, 3, 7).double().view(7, 1)
    out = normalize_features(x)
    torch.testing.assert_close(out.norm(dim=1), torch.full((7,), 5**0.5, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normalize_features(3 * x), out, rtol=1e-9, atol=1e-9)
    assert torch.equal(normalize_features(torch.zeros(1, 5)), torch.zeros(1, 5))


def test_feature_norm_keeps_classifier_name_and_weights():
    net = network()
    state = {k: v.clone() for k, v in net.state_dict().items() if "classifier" in k}
    convert(net, "feature-norm", keep_norms=True).eval()
    x = draw(3, 1, 8, 8)
    expected = normalize_features(net.features(x).flatten(1)) @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(net.classifier, FeatureNormLinear)
    assert roles(net)["classifier.weight"] is Role.HEAD
    assert norm_layers(net)


@pytest.mark.parametrize("kind", ["weight-norm", "weight-standardization", "fedwon", "feature-norm"])
def test_weight_kinds_remove_norms_and_add_biases(kind):
    net = convert(network(), kind)
    assert not norm_layers(net)
    assert torch.equal(net.features[0].bias, torch.zeros(8, dtype=torch.float64))
    assert net.features[0].bias.dtype == torch.float64
    table = roles(net)
    heads = [k for k, r in table.items() if r is Role.HEAD]
    assert heads
    assert all(k.startswith("classifier") for k in heads)
    assert {r for k, r in table.items() if k not in heads} == {Role.BODY}
    net(draw(4, 1, 8, 8)).square().mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.parameters())
    copy.deepcopy(net).load_state_dict(net.state_dict())


def test_weight_norm_adds_no_bias_to_classifier():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    convert(net, "weight-norm")
    assert net[0].bias is not None
    assert net[2].bias is None


def test_weight_standardization_works_with_group_norm():
    net = convert(convert(network(), "group", groups=4), "weight-standardization", keep_norms=True)
    assert isinstance(net.features[1], nn.GroupNorm)
    assert net.features[0].bias is None
    torch.testing.assert_close(net.features[4].weight.flatten(1).std(1), torch.ones(16).double(), rtol=1e-3, atol=1e-3)
    assert isinstance(net.classifier, nn.Linear)
    assert "classifier.weight" in net.state_dict()


def test_weight_kinds_reject_bad_input():
    flat = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for kind, what in (("weight-standardization", "weight standardization"), ("fedwon", "fedwon")):
        message = f"{what} works on convolutions and Sequential has none .* or weight-norm"
        rejects(message, convert, copy.deepcopy(flat), kind)
    message = "needs a linear classifier inside the model, and Sequential ends in Conv1d"
    rejects(message, convert, nn.Sequential(nn.Conv1d(2, 3, 1)), "feature-norm")
    rejects("clip=0.0 would stop all learning; use a positive number", FedWon(clip=0.0).prepare_model, network())
    rejects("and Linear ends in none", convert, nn.Linear(2, 3), "feature-norm")
