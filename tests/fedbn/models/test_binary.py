"""Binary networks: the sign, its gradient, what each norm does, and the law of growth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.models.binary import (
    BINARY_NORMS,
    BinaryCNN,
    BinaryConv2d,
    BinaryLinear,
    BinaryMLP,
    HalfBatchNorm,
    Sign,
    binary_norm,
    sign,
)
from fedbn.nn.probes import GradientGrowthProbe


def test_sign_of_zero_is_one_and_its_gradient_stops_outside_the_unit_interval():
    x = torch.tensor([-1.5, -1.0, -0.0, 0.0, 1.0, 1.0001], requires_grad=True)
    y = sign(x)
    y.backward(torch.arange(1.0, 7.0))
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("layer", [BinaryLinear(5, 3), BinaryConv2d(5, 3)])
def test_a_layer_computes_with_signs_and_trains_what_is_behind_them(layer):
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(2)
    before = layer.weight.detach().clone()
    assert (before.abs() > 1).any()
    x = torch.randn(4, 5) if isinstance(layer, nn.Linear) else torch.randn(4, 5, 6, 6)
    signs = torch.where(before >= 0, 1.0, -1.0)
    expected = x @ signs.T if isinstance(layer, nn.Linear) else nn.functional.conv2d(x, signs, padding=1)
    out = layer.train()(x)
    torch.testing.assert_close(out, expected)
    # The straight-through gradient reaches every latent weight, also one at the edge.
    out.square().sum().backward()
    assert (layer.weight.grad != 0).all()
    assert torch.equal(layer.weight, before.clamp(-1, 1))


def test_evaluation_leaves_latent_weights_alone():
    layer = BinaryLinear(2, 2).eval()
    with torch.no_grad():
        layer.weight.fill_(3.0)
    layer(torch.ones(1, 2))
    assert (layer.weight == 3).all()


@pytest.mark.parametrize("shape", [(40, 3), (40, 3, 5), (40, 3, 4, 4)])
def test_centring_and_scaling_are_the_halves_of_bn(shape):
    x = 2 * torch.randn(shape, dtype=torch.float64) + 3
    axes = [0, *range(2, len(shape))]
    mean, std = x.mean(axes, keepdim=True), (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
    center, scale = (HalfBatchNorm(3, part).double() for part in ("center", "scale"))
    torch.testing.assert_close(center(x), x - mean)
    torch.testing.assert_close(scale(x), x / std)
    whole = nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(scale(center(x)), whole)


@pytest.mark.parametrize("part", ["center", "scale"])
def test_half_bn_keeps_the_statistics_that_bn_keeps_and_evaluates_by_them(part):
    half, bn = HalfBatchNorm(3, part), nn.BatchNorm1d(3)
    with torch.no_grad():
        half.weight.fill_(2.0)
        half.bias.fill_(0.5)
    for _ in range(3):
        x = torch.randn(20, 3) + 4
        half(x), bn(x)
    assert torch.equal(half.running_mean, bn.running_mean)
    assert torch.equal(half.running_var, bn.running_var)
    before = half.running_mean.clone()
    x = torch.randn(5, 3)
    spread = (bn.running_var + 1e-5).sqrt()
    expected = x - bn.running_mean if part == "center" else x / spread
    torch.testing.assert_close(half.eval()(x), 2 * expected + 0.5)
    assert torch.equal(half.running_mean, before)


def growth(norm, width, networks=6):
    """Geometric mean over networks of the growth per layer at initialization."""
    logs = []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = BinaryMLP((width,), 10, norm=norm, width=width, depth=8)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, BinaryLinear)}
        with GradientGrowthProbe(layers) as probe:
            (model.hidden(torch.randn(128, width)) * torch.randn(128, width)).sum().backward()
        logs.append(math.log(probe.growth))
    return math.exp(sum(logs) / networks), probe


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_gradients_explode_by_the_law_without_a_norm(width):
    law = (2 * width / math.pi) ** 0.25
    assert growth("none", width, 3 if width == 512 else 8)[0] == pytest.approx(law, rel=0.05)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("norm", ["bn", "scale", "fixed"])
def test_scaling_keeps_gradients_at_bay_at_any_width(norm, width):
    assert 0.75 < growth(norm, width)[0] < 0.9


def test_centring_alone_does_not():
    assert growth("center", 128)[0] == pytest.approx((2 * 128 / math.pi) ** 0.25, rel=0.05)


def test_the_probe_sees_spread_and_share_of_the_unit_interval():
    width = 256
    _, probe = growth("none", width)
    deep = list(probe.layers)[1:]
    assert sum(probe.spread[n] for n in deep) / len(deep) == pytest.approx(math.sqrt(width), rel=0.05)
    share = sum(probe.small[n] for n in deep) / len(deep)
    assert share == pytest.approx(math.sqrt(2 / (math.pi * width)), rel=0.1)


def test_the_probe_takes_the_root_mean_square_of_a_gradient():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Identity())
    with GradientGrowthProbe(dict(net.named_children())) as probe:
        (net(torch.ones(1, 1)) * torch.tensor([3.0, 4.0])).sum().backward()
    assert probe.gradient == pytest.approx({"0": math.sqrt(12.5), "1": math.sqrt(12.5)})


def test_the_probe_takes_its_hooks_away_and_says_what_is_missing():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers = dict(net.named_children())
    with GradientGrowthProbe(layers) as probe:
        net(torch.ones(1, 2))
    with pytest.raises(UserError, match=r"call backward\(\) inside the with block"):
        _ = probe.growth
    assert not any(m._forward_hooks for m in net)
    with pytest.raises(UserError, match="watch two or more, not 1"), GradientGrowthProbe({"0": net[0]}):
        pass


@pytest.mark.parametrize("norm", BINARY_NORMS)
def test_every_norm_in_both_networks(norm):
    for model in (BinaryMLP((1, 8, 8), 3, norm=norm), BinaryCNN((1, 8, 8), 3, norm=norm)):
        signs = [m for m in model.modules() if isinstance(m, Sign)]
        seen = []
        signs[-1].register_forward_hook(lambda m, a, out: seen.append(out))
        assert model(torch.randn(4, 1, 8, 8)).shape == (4, 3)
        assert set(seen[0].unique().tolist()) <= {-1.0, 1.0}


def test_a_fixed_scale_is_the_root_of_the_fan_in():
    assert binary_norm("fixed", 4, 16)(torch.ones(1, 4)).tolist() == [[0.25] * 4]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="unknown norm of a binary network 'centre'. Did you mean 'center'"):
        BinaryMLP((4,), 2, norm="centre")
    with pytest.raises(UserError, match=r"binary-cnn takes images \[channels, >= 8, >= 8\], not examples of shape \[4"):
        BinaryCNN((4,), 2)
