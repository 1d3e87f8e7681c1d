from __future__ import annotations

import copy

import torch
from torch import nn

from fedbn.nn.hooks import capture_inputs
from fedbn.nn.roles import statistics_layers
from fedbn.online import predict_online
from fedbn.statistics.moments import Moments


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 3), nn.BatchNorm1d(3))
    return nn.Sequential(net, nn.Flatten(), nn.Linear(12, 2)).eval()


def stream(n=37):
    return torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1


def slow(model, x, prior, block):
    """Slow reference: per layer, a source of n0 windows merged with all inputs up to the block before."""
    layers = statistics_layers(model)
    source = {p: (m.running_mean.double().clone(), m.running_var.double().clone()) for p, m in layers.items()}
    inputs = {p: [] for p in layers}
    out = []
    for start in range(0, len(x), block):
        with torch.no_grad(), capture_inputs(layers, lambda p, value: inputs[p].append(value.double())):
            out.append(model(x[start : start + block]))
        for p, m in layers.items():
            values = torch.cat(inputs[p]).transpose(0, 1).flatten(1)
            n, n0 = values.shape[1], prior * values.shape[1] / min(start + block, len(x))
            mean0, var0 = source[p]
            mean = (n0 * mean0 + values.sum(1)) / (n0 + n)
            second = n0 * (var0 + (mean0 - mean) ** 2) + ((values - mean[:, None]) ** 2).sum(1)
            m.running_mean.copy_(mean)
            m.running_var.copy_(second / (n0 + n - 1))
    return torch.cat(out)


def test_predict_online_matches_reference():
    x = stream()
    for prior, block in ((5.0, 8), (0.0, 8), (50.0, 1)):
        out = predict_online(network(), x, prior=prior, block=block)
        torch.testing.assert_close(out, slow(network(), x, prior, block), rtol=1e-5, atol=1e-5)


def test_predict_online_is_causal():
    net, x = network(), stream()
    out = predict_online(copy.deepcopy(net), x, block=8)
    with torch.no_grad():
        assert torch.equal(out[:8], net(x[:8]))
    changed = x.clone()
    changed[16:] += 100
    assert torch.equal(predict_online(copy.deepcopy(net), changed, block=8)[:16], out[:16])


def test_predict_online_without_prior_ends_at_stream_moments():
    net, x = network(), stream()
    first = next(iter(statistics_layers(net).values()))
    inputs = []
    first.register_forward_pre_hook(lambda _m, a: inputs.append(a[0]))
    predict_online(net, x, prior=0.0)
    mean = Moments.of(torch.cat(inputs)).mean
    torch.testing.assert_close(first.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
