"""Binary networks: the sign and its gradient, the norms, and the growth of gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.models import binary
from fedbn.models.binary import BinaryCNN, BinaryConv2d, BinaryLinear, BinaryMLP, HalfBatchNorm, Sign, sign
from fedbn.nn.probes import GradientGrowthProbe
from tests.fedbn.helpers import rejects


def test_sign_passes_gradient_only_in_unit_interval():
    x = torch.tensor([-1.5, -1.0, -0.0, 0.0, 1.0, 1.0001], requires_grad=True)
    y = sign(x)
    y.backward(torch.arange(1.0, 7.0))
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("layer", [BinaryLinear(5, 3), BinaryConv2d(5, 3)])
def test_binary_layers_use_signs_and_train_latent_weights(layer):
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(2)
    before = layer.weight.detach().clone()
    assert (before.abs() > 1).any()
    x = torch.randn(4, 5) if isinstance(layer, nn.Linear) else torch.randn(4, 5, 6, 6)
    signs = torch.where(before >= 0, 1.0, -1.0)
    expected = x @ signs.T if isinstance(layer, nn.Linear) else nn.functional.conv2d(x, signs, padding=1)
    out = layer.train()(x)
    torch.testing.assert_close(out, expected)
    # The straight-through gradient reaches every latent weight, including those at the boundary.
    out.square().sum().backward()
    assert (layer.weight.grad != 0).all()
    assert torch.equal(layer.weight, before.clamp(-1, 1))


def test_evaluation_keeps_latent_weights():
    layer = BinaryLinear(2, 2).eval()
    with torch.no_grad():
        layer.weight.fill_(3.0)
    layer(torch.ones(1, 2))
    assert (layer.weight == 3).all()


@pytest.mark.parametrize("shape", [(40, 3), (40, 3, 5), (40, 3, 4, 4)])
def test_half_bn_parts_compose_to_bn(shape):
    x = 2 * torch.randn(shape, dtype=torch.float64) + 3
    axes = [0, *range(2, len(shape))]
    mean, std = x.mean(axes, keepdim=True), (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
    center, scale = (HalfBatchNorm(3, part).double() for part in ("center", "scale"))
    torch.testing.assert_close(center(x), x - mean)
    torch.testing.assert_close(scale(x), x / std)
    whole = nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(scale(center(x)), whole)


@pytest.mark.parametrize("part", ["center", "scale"])
def test_half_bn_tracks_and_uses_running_statistics(part):
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
    std = (bn.running_var + 1e-5).sqrt()
    expected = x - bn.running_mean if part == "center" else x / std
    torch.testing.assert_close(half.eval()(x), 2 * expected + 0.5)
    assert torch.equal(half.running_mean, before)


def growth(norm, width, networks=6):
    """Geometric mean over networks of the gradient growth per layer at initialization, and the last probe."""
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
def test_gradient_growth_without_norm_follows_formula(width):
    expected = (2 * width / math.pi) ** 0.25
    assert growth("none", width, 3 if width == 512 else 8)[0] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("norm", ["bn", "scale", "fixed"])
def test_scaling_bounds_gradient_growth_at_any_width(norm, width):
    assert 0.75 < growth(norm, width)[0] < 0.9


def test_centering_does_not_reduce_gradient_growth():
    assert growth("center", 128)[0] == pytest.approx((2 * 128 / math.pi) ** 0.25, rel=0.05)


def test_probe_measures_std_and_unit_share():
    width = 256
    _, probe = growth("none", width)
    deep = list(probe.layers)[1:]
    assert sum(probe.std[n] for n in deep) / len(deep) == pytest.approx(math.sqrt(width), rel=0.05)
    share = sum(probe.unit_share[n] for n in deep) / len(deep)
    assert share == pytest.approx(math.sqrt(2 / (math.pi * width)), rel=0.1)


def test_probe_measures_root_mean_square_gradient():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Identity())
    with GradientGrowthProbe(dict(net.named_children())) as probe:
        (net(torch.ones(1, 1)) * torch.tensor([3.0, 4.0])).sum().backward()
    assert probe.gradient == pytest.approx({"0": math.sqrt(12.5), "1": math.sqrt(12.5)})


def test_probe_removes_hooks_and_rejects_bad_input():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers = dict(net.named_children())
    with GradientGrowthProbe(layers) as probe:
        net(torch.ones(1, 2))
    with pytest.raises(UserError, match=r"call backward\(\) inside the with block"):
        _ = probe.growth
    assert not any(m._forward_hooks for m in net)
    with pytest.raises(UserError, match="pass at least two, not 1"), GradientGrowthProbe({"0": net[0]}):
        pass


@pytest.mark.parametrize("norm", binary.BINARY_NORMS)
def test_binary_networks_support_every_norm(norm):
    for model in (BinaryMLP((1, 8, 8), 3, norm=norm), BinaryCNN((1, 8, 8), 3, norm=norm)):
        signs = [m for m in model.modules() if isinstance(m, Sign)]
        outputs = []
        signs[-1].register_forward_hook(lambda m, a, out: outputs.append(out))
        assert model(torch.randn(4, 1, 8, 8)).shape == (4, 3)
        assert set(outputs[0].unique().tolist()) <= {-1.0, 1.0}


def test_fixed_scale_divides_by_root_of_fan_in():
    assert binary.binary_norm("fixed", 4, 16)(torch.ones(1, 4)).tolist() == [[0.25] * 4]


def test_binary_networks_reject_bad_input():
    rejects("unknown norm of a binary network 'centre'. Did you mean 'center'", BinaryMLP, (4,), 2, norm="centre")
    rejects(r"binary-cnn takes images \[channels, >= 8, >= 8\], not examples of shape \[4", BinaryCNN, (4,), 2)
