from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbn.statistics.moments import MAX_STACKED_ELEMENTS, Moments, naive_mean, pooled, pooled_variance
from tests import oracles

values = st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=2), min_size=1, max_size=12)
parts = st.lists(values, min_size=1, max_size=5)


def of(rows):
    return Moments.of(torch.tensor(rows, dtype=torch.float64))


def close(a, b):
    assert float(a.n) == pytest.approx(float(b.n), rel=1e-12)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-9, atol=1e-6)


@given(parts)
def test_pooled_partition_equals_moments_of_union(groups):
    close(pooled(map(of, groups)), of([row for group in groups for row in group]))


@given(values, values, values)
def test_merge_is_a_commutative_monoid(a, b, c):
    a, b, c = of(a), of(b), of(c)
    close(a.merge(b), b.merge(a))
    close(a.merge(b).merge(c), a.merge(b.merge(c)))
    close(a.merge(Moments.empty(2)), a)
    close(Moments.empty(2).merge(a), a)


@given(values, values)
def test_unmerge_inverts_merge(a, b):
    close(of(a).merge(of(b)).unmerge(of(b)), of(a))


@given(values, st.floats(0.01, 1))
def test_decay_keeps_mean_and_variance(a, factor):
    old, new = of(a), of(a).decay(factor)
    torch.testing.assert_close(new.mean, old.mean)
    torch.testing.assert_close(new.variance(), old.variance(), rtol=1e-9, atol=1e-12)
    assert float(new.n) == pytest.approx(factor * len(a))


@given(values, values, st.floats(0, 1000))
def test_shrink_merges_with_weighted_prior(a, prior, n0):
    weighted = Moments.from_variance(n0, of(prior).mean, of(prior).variance())
    close(of(a).shrink(of(prior), n0), weighted.merge(of(a)))


def test_pooled_keeps_variance_for_large_mean():
    x = torch.tensor([[1e9], [1e9 + 1], [1e9 + 2]], dtype=torch.float64)
    assert float(pooled([Moments.of(x[:1]), Moments.of(x[1:])]).variance()) == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 2, 2, 2)])
def test_moments_match_torch_for_any_position_axes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dims = [d for d in range(x.dim()) if d != 1]
    m = Moments.of(x)
    torch.testing.assert_close(m.mean, x.double().mean(dims))
    torch.testing.assert_close(m.variance(unbiased=True), x.double().var(dims, correction=1))


@given(st.integers(1, 9), st.integers(1, 4))
def test_naive_mean_is_independent_of_stack_size(count, size):
    values = [torch.tensor([[float(i), -1.0]]) for i in range(count)]
    with mock.patch("fedbn.statistics.moments.STACK_SIZE", size):
        mean = naive_mean(values, [i + 1 for i in range(count)])
    expected = sum(i * (i + 1) for i in range(count)) / sum(range(1, count + 1))
    assert mean.tolist() == [[pytest.approx(expected), -1.0]]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 511, 512, 513, 1030])
def test_naive_mean_has_the_bits_of_one_sum_over_all_columns(count):
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(300, count, dtype=torch.float64, generator=draw)
    weights = torch.rand(300, dtype=torch.float64, generator=draw)
    shares = weights / sum(weights.tolist())
    assert torch.equal(naive_mean(values, weights.tolist()), values.clone().mul_(shares[:, None]).sum(0))


@pytest.mark.parametrize("count", [MAX_STACKED_ELEMENTS, MAX_STACKED_ELEMENTS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_naive_mean_weights_tensors_of_any_size(count, dtype):
    values = [torch.full((count,), value, dtype=dtype) for value in (1.0, -2.0, 10.0)]
    mean = naive_mean(values, [5, 3, 0.5])
    assert mean.dtype == dtype
    assert mean.shape == (count,)
    torch.testing.assert_close(mean, torch.full_like(mean, (5 * 1 + 3 * -2 + 0.5 * 10) / 8.5))
    large = [torch.full((count,), value, dtype=dtype) for value in (1e8, 1.0, -1e8)]
    torch.testing.assert_close(naive_mean(large, [1, 1, 1]), torch.full_like(mean, 1 / 3), rtol=1e-6, atol=0)


def test_pooled_variance_equals_variance_of_union_of_unequal_parts():
    parts = [
        torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + n for n in (2, 5, 9)
    ]
    means, variances = ([f(part) for part in parts] for f in (lambda p: p.mean(0), lambda p: p.var(0, correction=0)))
    union = torch.cat(parts)
    torch.testing.assert_close(pooled_variance(means, variances, [2, 5, 9]), union.var(0, correction=0))
    torch.testing.assert_close(naive_mean(means, [2, 5, 9]), union.mean(0))


def test_pooled_variance_includes_variance_of_means():
    means = [torch.tensor([-3.0]), torch.tensor([3.0])]
    variances = [torch.tensor([1.0]), torch.tensor([1.0])]
    assert float(naive_mean(variances, [1, 1])) == 1.0
    assert float(pooled_variance(means, variances, [1, 1])) == 10.0
    assert pooled_variance(means, variances, [1, 1]).dtype == torch.float32


def test_w2_is_a_metric():
    a, b, c = (of([[i, 2.0 * i], [i + 1.0, 3.0 * i]]) for i in (0.0, 1.0, 5.0))
    assert float(a.w2(a)) == 0
    assert float(a.w2(b)) == float(b.w2(a)) > 0
    assert float(a.w2(c)) <= float(a.w2(b)) + float(b.w2(c)) + 1e-12


def test_moments_reject_bad_input():
    one = of([[1.0, 2.0]])
    with pytest.raises(ValueError, match="unbiased variance"):
        one.variance(unbiased=True)
    with pytest.raises(ValueError, match="cannot remove 2 values from 1"):
        one.unmerge(of([[1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises(ValueError, match=r"decay factor must be in \[0, 1\]"):
        one.decay(1.5)
    with pytest.raises(ValueError, match="n0 >= 0"):
        one.shrink(one, -1)


@given(st.lists(st.tuples(*3 * [st.floats(-9, 9)], st.floats(0.1, 50)), min_size=1, max_size=6))
def test_weighted_mean_and_pooled_variance_match_definitions(clients):
    first, second, variance, weights = zip(*clients, strict=True)
    means = torch.tensor([first, second], dtype=torch.float64).T
    variances = torch.tensor([variance, variance], dtype=torch.float64).T.abs()
    expected = oracles.mean(means, weights), oracles.variance_of_union(means, variances, weights)
    actual = naive_mean(list(means), weights), pooled_variance(list(means), list(variances), weights)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
