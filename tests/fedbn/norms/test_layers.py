"""Batch Renormalization, ghost BN, instance-aware BN, dual BN and adaptive instance normalization: exact limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbn.nn.conversion import convert
from fedbn.nn.roles import statistics_layers
from fedbn.norms.adain import adain
from fedbn.norms.batch_renorm import BatchRenorm
from fedbn.norms.dual_bn import adversarial
from fedbn.norms.ghost_bn import GhostBN
from fedbn.norms.iabn import IABN
from fedbn.statistics.recalibration import recalibrate
from tests.fedbn.helpers import bn_eval, draw, rejects, trained

SHAPES = [(9, 3), (9, 3, 4), (6, 3, 2, 5)]


def assert_equal_with_gradient(y, expected, x, tolerance=1e-11):
    """Assert equal outputs and equal gradients of the input."""
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    gy = draw(*y.shape, seed=3)
    actual, reference = (torch.autograd.grad(out, x, gy, retain_graph=True)[0] for out in (y, expected))
    torch.testing.assert_close(actual, reference, rtol=tolerance, atol=tolerance)


# Batch Renormalization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_renorm_with_closed_limits_is_batch_norm(shape):
    x = draw(*shape).requires_grad_()
    for layer in (BatchRenorm(3, r_max=1.0, d_max=0.0, start=0, r_full=0, d_full=0), BatchRenorm(3)):
        bn = F.batch_norm(x, None, None, trained(layer).weight, layer.bias, training=True, eps=layer.eps)
        assert_equal_with_gradient(layer(x), bn, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_renorm_with_open_limits_matches_evaluation(shape):
    x = draw(*shape).requires_grad_()
    layer = trained(BatchRenorm(3, r_max=math.inf, d_max=math.inf, start=0, r_full=0, d_full=0))
    before = copy.deepcopy(layer).eval()
    y = layer(x)
    torch.testing.assert_close(y, before(x), rtol=1e-11, atol=1e-11)
    # The gradient goes through the batch statistics: shifting the whole batch changes nothing.
    (gradient,) = torch.autograd.grad(y, x, draw(*shape, seed=3))
    assert float(gradient.transpose(0, 1).flatten(1).sum(1).abs().max()) < 1e-10
    torch.testing.assert_close(layer.eval()(x), bn_eval(layer, x), rtol=0, atol=0)


def test_batch_renorm_clips_scale_and_shift():
    layer = trained(BatchRenorm(3, momentum=0.2, r_max=1.2, d_max=0.1, start=0, r_full=0, d_full=0))
    x = draw(9, 3) * torch.tensor([1.0, 0.1, 0.5]) - torch.tensor([-3.0, 3.0, 0.0])
    mean, sigma = x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()
    old_mean, old_sigma = layer.running_mean.clone(), (layer.running_var + 1e-5).sqrt()
    r = torch.clamp(sigma / old_sigma, 1 / 1.2, 1.2)
    d = torch.clamp((mean - old_mean) / old_sigma, -0.1, 0.1)
    assert {float(r.max()), float(r.min())} == {1.2, 1 / 1.2}
    assert {float(d.max()), float(d.min())} == {0.1, -0.1}
    expected = ((x - mean) / sigma * r + d) * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_mean, 0.8 * old_mean + 0.2 * mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((layer.running_var + 1e-5).sqrt(), 0.8 * old_sigma + 0.2 * sigma, rtol=1e-12, atol=1e-12)


def test_batch_renorm_limits_grow_linearly():
    layer = BatchRenorm(1)
    limits = [(1.0, 0.0), (1.0, 0.0), (2.0, 4.375), (1 + 2 * 20 / 35, 5.0), (3.0, 5.0), (3.0, 5.0)]
    assert [layer.limits(s) for s in (0, 5_000, 22_500, 25_000, 40_000, 10**6)] == limits
    counted = BatchRenorm(1, r_max=2.0, d_max=1.0, start=1, r_full=3, d_full=2)
    for _ in range(2):
        counted(torch.randn(4, 1))
    assert counted.limits(int(counted.num_batches_tracked)) == (1.5, 1.0)


def test_batch_renorm_trains_on_batch_of_one():
    layer = BatchRenorm(2, r_max=3.0, start=0, r_full=0, d_full=0)
    assert torch.isfinite(layer(torch.randn(1, 2))).all()


# Ghost BN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_ghost_bn_with_one_part_is_batch_norm(shape, momentum):
    plain = trained(nn.BatchNorm1d(3, momentum=momentum))
    plain._check_input_dim = lambda x: None
    layer = trained(GhostBN(3, momentum=momentum, size=shape[0]))
    for seed in range(3):
        x = draw(*shape, seed=seed).requires_grad_()
        assert_equal_with_gradient(layer(x), plain(x), x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


@given(st.integers(2, 20), st.integers(2, 8))
def test_ghost_bn_normalizes_parts_and_averages_statistics(rows, size):
    layer, x = GhostBN(2, momentum=1.0, size=size).double(), draw(rows, 2)
    cuts = list(range(0, rows, size))
    if len(cuts) > 1 and rows - cuts[-1] == 1:
        cuts.pop()  # a single row has no variance
    parts = [x[a:b] for a, b in zip(cuts, [*cuts[1:], rows], strict=True)]
    expected = torch.cat([F.batch_norm(p, None, None, training=True) for p in parts])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-10, atol=1e-12)
    var = sum(p.var(0) * len(p) / rows for p in parts)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-10, atol=1e-12)


# IABN -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_iabn_with_k_zero_is_instance_norm(shape):
    layer, x = trained(IABN(3, k=0.0)), draw(*shape).requires_grad_()
    length = x[0, 0].numel()
    mean = x.flatten(2).mean(2).view(*shape[:2], *[1] * (len(shape) - 2))
    var = x.flatten(2).var(2).view_as(mean)
    expected = (x - mean) / torch.sqrt(var + 1e-5)
    # Instance norm except for the unbiased variance.
    torch.testing.assert_close(expected * math.sqrt(length / (length - 1)), F.instance_norm(x), rtol=1e-4, atol=1e-4)
    w = [t.view(1, 3, *[1] * (len(shape) - 2)) for t in (layer.weight, layer.bias)]
    for mode in (True, False):
        assert_equal_with_gradient(layer.train(mode)(x), expected * w[0] + w[1], x)


@pytest.mark.parametrize("shape", SHAPES)
def test_iabn_with_infinite_k_is_batch_norm(shape):
    x = draw(*shape).requires_grad_()
    plain = trained(nn.BatchNorm1d(3))
    plain._check_input_dim = lambda x: None
    for k in (math.inf, 1e9):
        layer = trained(IABN(3, k=k)).eval()
        assert_equal_with_gradient(layer(x), bn_eval(layer, x), x)
    layer = trained(IABN(3, k=math.inf)).train()
    assert_equal_with_gradient(layer(x), plain(x), x)
    assert torch.equal(layer.running_var, plain.running_var)


def slow_iabn(x, mean, var, k, eps=1e-5):
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[n, c].tolist()
            length = len(values)
            m = sum(values) / length
            w = sum((v - m) ** 2 for v in values) / (length - 1)
            s_mu = math.sqrt((float(var[c]) + eps) / length)
            s_v = (float(var[c]) + eps) * math.sqrt(2 / (length - 1))

            def psi(d, t):
                return math.copysign(max(abs(d) - t, 0.0), d)

            mu_i = float(mean[c]) + psi(m - float(mean[c]), k * s_mu)
            v_i = max(0.0, float(var[c]) + psi(w - float(var[c]), k * s_v))
            out[n, c] = (x[n, c] - mu_i) / math.sqrt(v_i + eps)
    return out


@pytest.mark.parametrize("k", [0.5, 2.0, 4.0])
def test_iabn_corrects_beyond_standard_errors(k):
    x = draw(6, 3, 7) * torch.linspace(0.1, 5, 6).double().view(6, 1, 1) + torch.linspace(-3, 3, 6).view(6, 1, 1)
    layer = IABN(3, k=k, affine=False).double()
    rows = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer(x), slow_iabn(x, rows.mean(1), rows.var(1), k), rtol=1e-9, atol=1e-10)
    expected = slow_iabn(x, layer.running_mean, layer.running_var, k)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(expected, F.batch_norm(x, layer.running_mean, layer.running_var))


def test_iabn_with_few_positions_is_batch_norm():
    layer, x = trained(IABN(3, k=0.0, skip=4)).eval(), draw(5, 3, 4)
    assert torch.equal(layer(x), bn_eval(layer, x))
    assert not torch.allclose(layer(draw(5, 3, 5)), bn_eval(layer, draw(5, 3, 5)))


# Dual BN --------------------------------------------------------------------------------------------------------------


def test_dual_bn_branches_are_independent():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    clean, adversarial_bn = copy.deepcopy(net), copy.deepcopy(net)
    dual = convert(net, "dual-bn")
    x, z = draw(8, 4), draw(8, 4, seed=1) * 3
    assert torch.equal(dual(x), clean(x))
    with adversarial(dual):
        assert torch.equal(dual(z), adversarial_bn(z))
    assert torch.equal(dual.eval()(x), clean.eval()(x))
    with pytest.raises(RuntimeError), adversarial(dual):
        dual(x[:, :1])
    assert torch.equal(dual(x), clean(x))
    assert len(list(dual.parameters())) == len(list(clean.parameters())) + 2


def test_recalibrate_changes_only_active_branch_of_dual_bn():
    net = convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "dual-bn").double()
    recalibrate(net, draw(20, 4))
    active, inactive = statistics_layers(net).values()
    assert float(active.running_mean.abs().sum()) > 0
    assert float(inactive.running_mean.abs().sum()) == 0


# AdaIN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "style_shape"), [((4, 3, 9), (4, 3, 5)), ((4, 3, 2, 5), (1, 3, 4, 4))])
def test_adain_output_has_style_statistics(shape, style_shape):
    x, style = draw(*shape), draw(*style_shape, seed=1) * 3 - 2
    y = adain(x, style)
    actual, expected = y.flatten(2), style.flatten(2)
    torch.testing.assert_close(actual.mean(2), expected.mean(2).expand(4, 3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.std(2), expected.std(2).expand(4, 3), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(adain(x, x), x, rtol=1e-12, atol=1e-12)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchRenorm(2, r_max=0.5), "needs r_max >= 1 and d_max >= 0, not 0.5 and 5.0"),
        (lambda: BatchRenorm(2, d_max=-1), "needs r_max >= 1 and d_max >= 0, not 3.0 and -1"),
        (lambda: GhostBN(2, size=0), "parts of at least one row, not size=0"),
        (lambda: IABN(2, k=-1), "needs k >= 0 and skip >= 1, not k=-1 and skip=1"),
        (lambda: IABN(2, skip=0), "not k=4.0 and skip=0"),
        (lambda: adain(torch.zeros(2, 3), torch.zeros(2, 3)), r"at least two positions, got \[2, 3\]"),
        (lambda: adain(torch.zeros(2, 3, 1), torch.zeros(2, 3, 4)), r"at least two positions, got \[2, 3, 1\]"),
    ],
)
def test_layers_reject_bad_input(make, message):
    rejects(message, make)


# Normalization within a sample ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "group", "instance"])
def test_sample_norms_ignore_mode_batch_and_scale(kind):
    options = {"groups": 2} if kind == "group" else {}
    net = convert(nn.Sequential(nn.BatchNorm1d(4, eps=1e-12)), kind, **options).double()
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batched = net.train()(x)
    assert torch.equal(net.eval()(x), batched)
    for i in range(5):
        torch.testing.assert_close(net(x[i : i + 1]), batched[i : i + 1], rtol=1e-12, atol=1e-12)
    scaled = x * torch.linspace(0.5, 3, 5).double().view(5, 1, 1) + torch.linspace(-2, 2, 5).double().view(5, 1, 1)
    torch.testing.assert_close(net(scaled), batched, rtol=1e-8, atol=1e-8)
