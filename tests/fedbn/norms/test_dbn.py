"""Diminishing BN: closed forms of its schedules, limiting cases, aggregation on the server."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.norms.dbn import DiminishingBN, convert, next_epoch, schedule
from fedbn.strategies.base import Progress, Update
from fedbn.strategies.dbn import DBN
from tests.fedbn.helpers import rejects


def batches(n, rows=6, channels=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, channels, 2, generator=g) * 2 + 1).to(dtype) for _ in range(n)]


def moments(x):
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)


@pytest.mark.parametrize("mode", ["algorithm1", "inference"])
def test_dbn_with_1_over_m_averages_batch_statistics(mode):
    layer, data = DiminishingBN(3, alpha="1/m", mode=mode).double(), batches(50)
    for x in data:
        layer(x)
    means, stds = zip(*map(moments, data), strict=True)
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var.sqrt(), torch.stack(stds).mean(0), rtol=1e-12, atol=1e-12)


def implied_weights(alpha, n):
    """Final weight of each of n batches: batch j has mean 1 in channel j and 0 in the others."""
    layer = DiminishingBN(n, alpha=alpha, stat="var", mode="inference").double()
    for row in torch.eye(n, dtype=torch.float64):
        layer(row.expand(2, n))
    return layer.running_mean.tolist()


def test_dbn_with_1_over_m_squared_has_closed_form_weights():
    n = 200
    expected = [1 / j**2 * math.prod(1 - 1 / k**2 for k in range(j + 1, n + 1)) for j in range(1, n + 1)]
    weights = implied_weights("1/m^2", n)
    assert weights == pytest.approx(expected, abs=1e-12)
    assert weights[:3] == pytest.approx([0.5025, 0.1675, 0.0838], abs=1e-4)


@pytest.mark.parametrize("alpha", ["1", "0.25", "0", "1/m", "1/m^2", "1/m^0.5"])
def test_dbn_weights_sum_to_one(alpha):
    assert sum(implied_weights(alpha, 12)) == pytest.approx(1, abs=1e-12)


def test_dbn_matches_cumulative_batch_norm():
    layer = DiminishingBN(3, alpha="1/m", mode="inference", stat="var", unbiased=True)
    plain = nn.BatchNorm1d(3, momentum=None)
    for x in batches(40, dtype=torch.float32):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=2e-6, atol=2e-6)


def test_dbn_with_alpha_one_matches_bn_only_in_forward():
    x = batches(1)[0].requires_grad_()
    gy = batches(1, seed=1)[0]
    bn = F.batch_norm(x, None, None, training=True)
    (expected,) = torch.autograd.grad(bn, x, gy)
    for stat, tolerance in (("var", 1e-12), ("std", 2e-5)):
        y = DiminishingBN(3, alpha="1", stat=stat, affine=False).double()(x)
        torch.testing.assert_close(y, bn, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(y, x, gy)
        assert float((gradient - expected).norm() / expected.norm()) > 0.1
    y = DiminishingBN(3, alpha="1", mode="inference").double()(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, gy)[0], expected, rtol=1e-12, atol=1e-12)


def test_dbn_adds_epsilon_to_standard_deviation():
    layer = DiminishingBN(1, eps=1.0).eval()
    layer.running_var.fill_(9.0)
    assert float(layer(torch.tensor([[8.0]]))) == 2.0
    by_variance = DiminishingBN(1, eps=7.0, stat="var").eval()
    by_variance.running_var.fill_(9.0)
    assert float(by_variance(torch.tensor([[8.0]]))) == 2.0


def test_dbn_training_normalizes_by_updated_average():
    layer, (first, second) = DiminishingBN(3, alpha="0.5").double(), batches(2)
    layer(first)
    y = layer(second)
    (m1, s1), (m2, s2) = moments(first), moments(second)
    mean, std = (m1 + m2) / 2, (s1 + s2) / 2
    expected = (second - mean[:, None]) / (std[:, None] + 1e-5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(second), expected, rtol=1e-12, atol=1e-12)


def test_dbn_with_alpha_zero_keeps_first_statistics():
    layer, data = DiminishingBN(3, alpha="0").double(), batches(5)
    layer(data[0])
    first = layer.running_mean.clone(), layer.running_var.clone()
    torch.testing.assert_close(first[0], moments(data[0])[0])
    for x in data[1:]:
        layer(x)
    assert torch.equal(layer.running_mean, first[0])
    assert torch.equal(layer.running_var, first[1])


def test_next_epoch_advances_epoch_schedule():
    net, data = convert(nn.Sequential(nn.BatchNorm1d(3)), alpha="1/m", step="epoch").double(), batches(4)
    next_epoch(net)
    net(data[0])
    net(data[1])
    torch.testing.assert_close(net[0].running_mean, moments(data[1])[0])  # alpha is 1 in the whole first epoch
    next_epoch(net)
    net(data[2])
    torch.testing.assert_close(net[0].running_mean, (moments(data[1])[0] + moments(data[2])[0]) / 2)
    each_batch = convert(nn.Sequential(nn.BatchNorm1d(3)))
    next_epoch(each_batch)
    assert float(each_batch[0].steps) == 0


def test_dbn_step_counter_is_sent_to_late_clients():
    early, late, data = DiminishingBN(3, alpha="1/m"), DiminishingBN(3, alpha="1/m"), batches(3, dtype=torch.float32)
    early(data[0])
    early(data[1])
    late.load_state_dict({k: v for k, v in early.state_dict().items() if "tracked" not in k}, strict=False)
    assert torch.equal(early(data[2]), late(data[2]))


def test_dbn_server_follows_schedule_on_scale_of_statistic():
    def update(mean, var):
        state = {"running_mean": torch.tensor([mean]), "running_var": torch.tensor([var]), "steps": torch.tensor(4.0)}
        return Update(0, state, 1, 0.0)

    clients, keys = [update(-1.0, 15.0), update(1.0, 15.0)], ["running_mean", "running_var", "steps"]
    old = {"running_mean": torch.tensor([2.0]), "running_var": torch.tensor([4.0]), "steps": torch.tensor(0.0)}
    pooled_mean, pooled_var = 0.0, 16.0  # variance of the union: 15 + 1
    new = DBN("1/m").aggregate_statistics(clients, [1, 1], keys, old, Progress(4, 9))
    assert float(new["running_mean"]) == pytest.approx(0.75 * 2 + 0.25 * pooled_mean)
    assert float(new["running_var"]) == pytest.approx((0.75 * 2 + 0.25 * pooled_var**0.5) ** 2)
    assert float(new["steps"]) == 4
    variances = DBN("1/m", stat="var").aggregate_statistics(clients, [1, 1], keys, old, Progress(4, 9))
    assert float(variances["running_var"]) == pytest.approx(0.75 * 4 + 0.25 * pooled_var)
    first = DBN("0").aggregate_statistics(clients, [1, 1], keys, old, Progress(1, 9))
    assert float(first["running_var"]) == pytest.approx(16)


@pytest.mark.parametrize("text", ["", "2", "-0.1", "1/n", "1/m^x", "1/m^-1", "1/m^0", "1/mm", "nan"])
def test_schedule_rejects_bad_input(text):
    rejects(r"unknown schedule '.*': write a number from 0 to 1, 1/m, or 1/m\^h", schedule, text)
