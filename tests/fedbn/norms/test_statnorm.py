"""StatNorm: equal to batch norm with batch statistics, and to autograd with any statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedbn.nn.batchnorm import along
from fedbn.norms.statnorm import batch_statistics, blend, normalize
from tests.fedbn.helpers import draw

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 2, 5), (3, 2, 2, 3, 2)]


def gradient(y, x, upstream):
    return torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_by_batch_statistics_is_batch_norm(shape):
    x, gy = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    mean, var, n = batch_statistics(x.detach())
    assert int(n) == x.numel() // shape[1]
    y, expected = normalize(x, mean, var), F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(y, x, gy), gradient(expected, x, gy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_by_constants_is_evaluation_batch_norm(shape):
    x, gy = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    mean, var = draw(*shape[1:2], seed=2), draw(*shape[1:2], seed=3).abs()
    y, expected = normalize(x, mean, var, gradient_map=None), F.batch_norm(x, mean, var)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(y, x, gy), gradient(expected, x, gy), rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 10**6))
def test_normalize_with_averaged_gradients_is_one_batch(sizes, seed):
    """The protocol of section 12 for one layer: weighted means forward, weighted means of gradients backward."""
    x, gy = draw(sum(sizes), 2, 3, seed=seed), draw(sum(sizes), 2, 3, seed=seed + 1)
    whole = x.clone().requires_grad_()
    expected = gradient(F.batch_norm(whole, None, None, training=True), whole, gy)
    mean, var, _ = batch_statistics(x)
    shares = [s / sum(sizes) for s in sizes]
    # The loss of a client is the mean over its rows, so its gradients are larger by 1 / share.
    parts = [p.clone().requires_grad_() for p in x.split(sizes)]
    gradients = []
    for part, g, share in zip(parts, gy.split(sizes), shares, strict=True):
        y = normalize(part, mean, var, gradient_map=lambda *own: gradients.append(own) or own)
        gradient(y, part, g / share)
    averaged = tuple(sum(w * s[i] for w, s in zip(shares, gradients, strict=True)) for i in (0, 1))
    actual = [
        share * gradient(normalize(part, mean, var, gradient_map=lambda *_: averaged), part, g / share)
        for part, g, share in zip(parts, gy.split(sizes), shares, strict=True)
    ]
    torch.testing.assert_close(torch.cat(actual), expected, rtol=1e-10, atol=1e-11)


def test_normalize_computes_statistic_gradients_of_autograd():
    x, gy = draw(4, 3, 5), draw(4, 3, 5, seed=1)
    mean, var = draw(3, seed=2).requires_grad_(), (draw(3, seed=3).abs() + 0.5).requires_grad_()
    slow = (x - along(mean, x)) / torch.sqrt(along(var, x) + 1e-5)
    expected = torch.autograd.grad(slow, (mean, var), gy)
    gradients, leaf = [], x.clone().requires_grad_()
    gradient(normalize(leaf, mean, var, gradient_map=lambda *own: gradients.append(own) or own), leaf, gy)
    for actual, reference in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@given(st.integers(0, 10**6))
def test_normalize_ignores_masked_values(shape, seed):
    x, gy = draw(*shape, seed=seed), draw(*shape, seed=seed + 1)
    mask = torch.rand((shape[0], *shape[2:]), generator=torch.Generator().manual_seed(seed)) < 0.6
    mask.view(-1)[:2] = True
    leaf = x.clone().requires_grad_()
    mean, var, n = batch_statistics(x, mask)
    y = normalize(leaf, mean, var, mask=mask)
    valid = x.movedim(1, -1)[mask].clone().requires_grad_()  # [n, C]
    expected = F.batch_norm(valid, None, None, training=True)
    assert int(n) == len(valid)
    torch.testing.assert_close(y.movedim(1, -1)[mask], expected, rtol=1e-11, atol=1e-11)
    assert float(y.detach().movedim(1, -1)[~mask].abs().sum()) == 0
    actual = gradient(y, leaf, gy).movedim(1, -1)
    torch.testing.assert_close(actual[mask], gradient(expected, valid, gy.movedim(1, -1)[mask]), rtol=1e-10, atol=1e-10)
    assert float(actual[~mask].abs().sum()) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(40, 3), (8, 3, 40), (4, 3, 6, 5), (4, 3, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalize_computes_half_precision_in_float32(dtype, shape, masked):
    x, gy = (draw(*shape) + 100).to(dtype), draw(*shape, seed=1).to(dtype)
    mask = draw(shape[0], *shape[2:], seed=2) > 0 if masked else None
    mean, var, _ = batch_statistics(x, mask)
    assert mean.dtype == var.dtype == torch.float32
    leaf, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    y = normalize(leaf, mean, var, mask=mask)
    assert y.dtype == dtype
    expected = normalize(wide, mean, var, mask=mask)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(gradient(y, leaf, gy), gradient(expected, wide, gy.float()).to(dtype))


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_blend_averages_first_and_second_moments(a, seed):
    mean, var, m, w = draw(4, 5, seed=seed).unbind()[:4]
    var, w = var.abs(), w.abs()
    blended_mean, blended_var = blend(mean, var, m, w, a)
    first, second = (1 - a) * mean + a * m, (1 - a) * (var + mean**2) + a * (w + m**2)
    torch.testing.assert_close(blended_mean, first, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(blended_var, second - first**2, rtol=1e-10, atol=1e-10)
    assert float(blended_var.min()) >= 0


def test_normalize_rejects_double_backward():
    x = draw(4, 2).requires_grad_()
    mean, var, _ = batch_statistics(x.detach())
    (g,) = torch.autograd.grad((normalize(x, mean, var) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
