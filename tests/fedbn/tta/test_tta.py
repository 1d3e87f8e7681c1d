from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.nn.roles import clone
from fedbn.online.prequential import follow_blocks
from fedbn.online.prequential_metrics import score
from fedbn.plugins import render
from fedbn.statistics.recalibration import recalibrate
from fedbn.streams import Stream
from fedbn.tta.adaptation_rates import RATES, add_rates
from fedbn.tta.base import (
    Adapter,
    affine_parameters,
    augment,
    entropy,
    features_of,
    method,
    methods,
    replace_bn,
    sharpness_aware_step,
)
from fedbn.tta.eata import fisher_information
from fedbn.tta.lame import laplacian_smoothing, nearest_neighbors
from fedbn.tta.note import InstanceAwareBN, Reservoir
from fedbn.tta.rotta import Memory, RobustBN
from fedbn.tta.sotta import ConfidentMemory
from tests.helpers import same

ALL = sorted(methods())
FROZEN = ("lame", "sight")


def network(sharp=30.0):
    torch.manual_seed(0)
    net = HarCNN((3, 16), 4)
    recalibrate(net, windows(40, seed=9))
    with torch.no_grad():
        net.classifier.weight.mul_(sharp)  # confident on some windows only, like a trained network
    add_rates(net).get_buffer(RATES).fill_(0.05)
    return net.eval()


def windows(n=40, seed=1, loc=0.5):
    return torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(seed)) * 1.5 + loc


def predictions(adapter, x, block=8):
    return torch.cat([adapter(rows) for rows in x.split(block)])


def adapted(text, net, x):
    """Predictions for windows in blocks of eight, with a method that gets the same windows as source."""
    return predictions(Adapter(method(text), net, x), x)


def with_large_steps(name):
    """A method with steps large and frequent enough to have an effect on forty windows."""
    options = {
        "note": ":capacity=8:lr=0.05",
        "rotta": ":capacity=8:lr=0.05:nu=0.5",
        "sar": ":lr=0.05:margin=1:collapse=0",
        "sotta": ":capacity=8:lr=0.05:confident=0.5",
        "atp": "",
    }
    return method(name + options.get(name, "" if name in FROZEN else ":lr=0.05"))


@pytest.mark.parametrize("name", ALL)
def test_reset_is_bit_exact_and_leaves_the_model_unchanged(name):
    net, spec = network(), with_large_steps(name)
    before = clone(net.state_dict())
    adapter = Adapter(spec, net, windows(seed=2))
    first = predictions(adapter, windows())
    adapter.reset()
    assert torch.equal(predictions(adapter, windows()), first)
    assert torch.equal(predictions(Adapter(spec, net, windows(seed=2)), windows()), first)
    assert same(before, net.state_dict())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", sorted(set(ALL) - {"lame"}))
def test_predictions_depend_on_past_windows_only(name):
    net, x = network(), windows()
    changed = x.clone()
    changed[24:] += 3
    one, other = (predictions(Adapter(with_large_steps(name), net, x), inputs) for inputs in (x, changed))
    assert torch.equal(one[:24], other[:24])
    changed = x.clone()
    changed[:8] = changed[:8].flip(2) * 3
    assert not torch.equal(predictions(Adapter(with_large_steps(name), net, x), changed)[-8:], one[-8:])


@pytest.mark.parametrize("name", ALL)
def test_method_runs_on_a_stream_and_round_trips_as_text(name):
    spec = method(name)
    assert method(render(spec)) == spec
    x = windows(33)
    stream = Stream("ann", x, torch.arange(33) % 4, torch.zeros(33, dtype=torch.int64))
    trace = follow_blocks(Adapter(spec, network(), x), stream, spec.block)
    assert 0 <= score(trace).accuracy <= 1
    assert spec.source
    assert isinstance(spec.includes_current, bool)


def batch_normalized(net, x):
    """Reference for prediction-time BN: forward passes of copies in training mode, in blocks of eight."""
    return predictions(lambda rows: copy.deepcopy(net).train()(rows).detach(), x)


@pytest.mark.parametrize(
    ("text", "rtol", "atol"),
    [
        *((f"{name}:lr=0", 1e-5, 1e-4) for name in ("tent", "sar", "eata")),
        # No window is reliable.
        *((f"{name}:lr=0.5:margin=0", 1e-4, 1e-3) for name in ("sar", "eata")),
        # Every loss is below the threshold, so scale and shift are reset after each step.
        ("sar:lr=0.5:margin=1:collapse=100", 1e-4, 1e-3),
    ],
)
def test_method_without_adaptation_equals_prediction_time_bn(text, rtol, atol):
    net, x = network(), windows()
    torch.testing.assert_close(adapted(text, net, x), batch_normalized(net, x), rtol=rtol, atol=atol)


def test_tent_lowers_entropy_of_a_repeated_block():
    net, x = network(), windows(16)
    adapter = Adapter(method("tent:lr=0.01"), net, x)
    entropies = [float(entropy(adapter(x)).mean()) for _ in range(10)]
    assert entropies[-1] < entropies[0]


def test_sharpness_aware_step_uses_gradient_up_the_slope():
    start = torch.tensor([3.0, 4.0])
    w = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=0.1)
    # Loss |w|^2 / 2: the gradient is w, up the slope it is w (1 + rho / |w|).
    sharpness_aware_step(optimizer, lambda: (w**2).sum() / 2, rho=0.5)
    torch.testing.assert_close(w.detach(), start * (1 - 0.1 * 1.1))


def test_sar_resets_on_collapse():
    always, never = (adapted(f"sar:lr=0.5:margin=1:collapse={c}", network(), windows()) for c in (100, 0))
    assert not torch.allclose(never, always, rtol=1e-2, atol=1e-2)


def test_eata_skips_redundant_windows():
    net, x = network(), windows(8).repeat(4, 1, 1)
    # The first block sets the average. With d=0 every later window is redundant, so only one step is taken.
    out = adapted("eata:lr=0.1:margin=1:redundant=0", net, x).split(8)
    assert not torch.allclose(out[1], out[0])
    assert torch.equal(out[2], out[1])
    assert torch.equal(out[3], out[1])


def test_eata_anchor_limits_adaptation():
    net, x = network(sharp=5.0), windows(8).repeat(20, 1, 1)

    def moved(fisher):
        out = predictions(Adapter(method(f"eata:lr=0.01:margin=1:redundant=2:fisher={fisher}"), net, windows(64)), x)
        return float((out[-8:] - out[:8]).abs().max())

    assert moved(1000) < 0.8 * moved(0)


def test_fisher_information_is_mean_squared_gradient():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 3)).eval()
    x = torch.randn(130, 2)
    actual = fisher_information(net, affine_parameters(net), x)
    expected = torch.zeros(2)
    for rows in (x[:64], x[64:128], x[128:]):
        net.zero_grad()
        out = net(rows)
        F.cross_entropy(out, out.argmax(1)).backward()
        expected += net[1].bias.grad ** 2 / 3
    torch.testing.assert_close(actual[1], expected)


def test_cotta_keep_and_restore_limit_adaptation():
    net, x = network(), windows(8).repeat(6, 1, 1)
    initial = batch_normalized(net, x[:8])

    def moved(options):
        return float((adapted(f"cotta:unsure=0:{options}", net, x)[-8:] - initial).abs().max())

    assert moved("lr=0.01:keep=1:restore=0") < 1e-3
    assert moved("lr=0:keep=0:restore=0") < 1e-3
    # With every weight restored after each step, a teacher that copies the student is one step from the source.
    assert 1e-3 < moved("lr=0.001:keep=0:restore=1") < 0.7 * moved("lr=0.001:keep=0:restore=0")


def test_cotta_averages_views_if_source_confidence_is_low():
    net, x = network(), windows(8)
    plain, views = (adapted(f"cotta:unsure={unsure}", net, x) for unsure in (0, 2))
    assert not torch.equal(plain, views)
    assert F.cosine_similarity(plain.flatten(), views.flatten(), dim=0) > 0.9


@given(st.lists(st.integers(0, 3), min_size=1, max_size=120), st.integers(1, 12))
def test_pbrs_balances_classes(labels, capacity):
    memory = Reservoir(capacity, torch.Generator().manual_seed(0))
    for i, label in enumerate(labels):
        before = [c for _, c in memory.items]
        memory.add(torch.tensor(float(i)), label)
        after = [c for _, c in memory.items]
        assert len(after) == min(i + 1, capacity)
        if len(before) == capacity:
            most = max(map(before.count, before))
            if before.count(label) < most:
                # The new window replaces one of a largest class.
                assert float(memory.items[-1][0]) == i
                (reduced,) = [c for c in set(before) if c != label and after.count(c) < before.count(c)]
                assert before.count(reduced) == most
            else:
                assert sorted(before) == sorted(after)
    assert memory.num_seen == {c: labels.count(c) for c in set(labels)}


def test_pbrs_of_one_class_samples_uniformly():
    num_early = 0
    for seed in range(400):
        memory = Reservoir(5, torch.Generator().manual_seed(seed))
        for i in range(20):
            memory.add(torch.tensor(float(i)), 0)
        num_early += sum(int(x) < 10 for x, _ in memory.items)
    # The first half of the windows seen should be half of those stored.
    assert abs(num_early / 2000 - 0.5) < 0.04


def layer(k, channels=3):
    bn = nn.BatchNorm1d(channels)
    bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    bn.running_var.fill_(2.0)
    nn.init.normal_(bn.weight)
    original = copy.deepcopy(bn).eval()
    return replace_bn(nn.Sequential(bn).eval(), InstanceAwareBN, k=k)[0].eval(), original


def test_iabn_interpolates_between_bn_and_instance_norm():
    x = windows()
    wide, bn = layer(1e9)
    torch.testing.assert_close(wide(x), bn(x))
    narrow, bn = layer(0.0)
    m, v = x.mean(2, keepdim=True), x.var(2, keepdim=True)
    expected = (x - m) / (v + bn.eps).sqrt() * bn.weight[:, None] + bn.bias[:, None]
    torch.testing.assert_close(narrow(x), expected)
    flat, bn = layer(0.0)
    torch.testing.assert_close(flat(x[:, :, 0]), bn(x[:, :, 0]))


def test_iabn_matches_its_formula():
    def psi(d, t):
        return math.copysign(max(abs(d) - t, 0), d)

    x, k = windows(5), 1.5
    iabn, bn = layer(k)
    out, size = torch.empty_like(x), x.shape[2]
    for n, c in itertools.product(range(5), range(3)):
        mu, v = float(bn.running_mean[c]), float(bn.running_var[c])
        m, w = float(x[n, c].mean()), float(x[n, c].var())
        mean = mu + psi(m - mu, k * math.sqrt((v + bn.eps) / size))
        var = max(0.0, v + psi(w - v, k * (v + bn.eps) * math.sqrt(2 / (size - 1))))
        out[n, c] = (x[n, c] - mean) / math.sqrt(var + bn.eps) * bn.weight[c] + bn.bias[c]
    torch.testing.assert_close(iabn(x), out)


def test_iabn_updates_running_statistics_like_bn():
    iabn, bn = layer(4.0)
    assert isinstance(iabn, InstanceAwareBN)
    for norm in (iabn, bn):
        norm.momentum = 0.3
        norm.train()(windows())
    torch.testing.assert_close((iabn.running_mean, iabn.running_var), (bn.running_mean, bn.running_var))


def test_cstu_balances_classes_and_drops_old_and_uncertain():
    memory = Memory(capacity=4, classes=2)
    for i, h in enumerate([0.1, 0.6, 0.2, 0.3]):
        memory.add(torch.tensor(float(i)), 0, h)
    # Two places for class 0. Window 2 replaces the uncertain window 1; window 3 has the highest score and is dropped.
    assert {float(i.x) for i in memory.items} == {0.0, 2.0}
    memory.add(torch.tensor(4.0), 1, 0.5)
    memory.add(torch.tensor(5.0), 1, 0.5)
    assert sorted(i.label for i in memory.items) == [0, 0, 1, 1]
    ages = {float(i.x): i.age for i in memory.items}
    assert (ages[0.0], ages[5.0]) == (6, 1)
    # At equal uncertainty the older window is replaced.
    memory.add(torch.tensor(6.0), 1, 0.5)
    assert {float(i.x) for i in memory.items} & {4.0, 6.0} == {6.0}


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1.3)), min_size=1, max_size=80))
def test_cstu_never_exceeds_capacity_or_quota(windows):
    memory = Memory(capacity=8, classes=4)
    for label, h in windows:
        memory.add(torch.zeros(()), label, h)
        assert len(memory.items) <= 8
        assert max(sum(i.label == c for i in memory.items) for c in range(4)) <= 2


def test_robust_bn_normalizes_by_updated_statistics():
    bn = nn.BatchNorm1d(3)
    net = replace_bn(nn.Sequential(bn), RobustBN)
    net[0].momentum = 0.05
    x = windows()
    torch.testing.assert_close(net.eval()(x), bn.eval()(x))
    out = net.train()(x)
    mean = 0.05 * x.mean((0, 2))
    var = 0.95 + 0.05 * x.var((0, 2), correction=0)
    torch.testing.assert_close(out, (x - mean[:, None]) / (var[:, None] + bn.eps).sqrt())
    torch.testing.assert_close(net[0].running_var, var)


@pytest.mark.parametrize("nu", [0.5, 1])
def test_rotta_teacher_moves_towards_student(nu):
    net, x = network(), windows(32)
    options = "rotta:capacity=8:lr=0.05"
    fixed, moved = (adapted(f"{options}:nu={value}", net, x) for value in (0, nu))
    torch.testing.assert_close(fixed[:8], moved[:8])
    assert (fixed[8:] - moved[8:]).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 8), (5, 3, 4, 6)])
def test_augment_scales_channels_and_adds_relative_noise(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 1
    draw = torch.Generator().manual_seed(0)
    scale = 1 + 0.2 * torch.randn(5, 3, generator=draw)
    noise = torch.randn(shape, generator=draw)
    level = x.flatten(2).std(2) if len(shape) > 2 else x.abs()
    broad = (slice(None), slice(None), *[None] * (len(shape) - 2))
    expected = x * scale[broad] + 0.2 * level[broad] * noise
    torch.testing.assert_close(augment(x, torch.Generator().manual_seed(0), 0.2), expected)


@pytest.mark.parametrize("text", ["note:k=1e9", "rotta"])
def test_method_equals_source_before_first_step(text):
    net, x = network(), windows(10)
    torch.testing.assert_close(Adapter(method(text), net, x)(x), net(x).detach(), rtol=1e-4, atol=1e-4)


def test_hus_stores_confident_windows_and_balances_classes():
    memory = ConfidentMemory(4, 0.9, torch.Generator().manual_seed(0))
    memory.add(torch.zeros(()), 0, 0.89)
    assert not memory.items
    for _ in range(6):
        memory.add(torch.zeros(()), 0, 0.95)
    for label in (1, 2, 1):
        memory.add(torch.zeros(()), label, 0.9)
    assert sorted(c for _, c in memory.items) in ([0, 0, 1, 2], [0, 1, 1, 2])


def test_sotta_equals_source_without_confident_windows():
    net, x = network(), windows()
    torch.testing.assert_close(adapted("sotta:confident=1.1:capacity=8", net, x), predictions(net, x).detach())


def test_lame_with_zero_and_full_affinity():
    logp = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    torch.testing.assert_close(laplacian_smoothing(logp, torch.zeros(6, 6)), logp)
    assert len(laplacian_smoothing(logp, torch.full((6, 6), 5.0)).argmax(1).unique()) == 1
    net, x = network(), windows(12)
    out = Adapter(method("lame:neighbors=0"), net, x)(x)
    torch.testing.assert_close(out.softmax(1), net(x).softmax(1).detach())


def test_lame_converges_to_a_fixed_point():
    g = torch.Generator().manual_seed(0)
    logp, features = torch.randn(20, 4, generator=g).log_softmax(1), torch.randn(20, 7, generator=g)
    w = nearest_neighbors(features, 3)
    assert w.sum(1).tolist() == [3] * 20
    assert w.diagonal().sum() == 0
    y = laplacian_smoothing(logp, w).exp()
    torch.testing.assert_close(y, (logp + w @ y).softmax(1), atol=1e-5, rtol=0)
    direct = F.cosine_similarity(features[:, None], features[None], dim=2).fill_diagonal_(-2)
    assert torch.equal(w.nonzero()[:, 1].view(20, 3), direct.topk(3).indices.sort().values)


def test_sight_without_surprise_and_with_full_surprise():
    net, x = network(sharp=5.0), windows(6)
    p = net(x).softmax(1).detach()
    # beta=0: no surprise, so the prior is the last output, and outputs are products of predictions.
    out = Adapter(method("sight:beta=0"), net, x)(x).softmax(1)
    expected = p.double().cumprod(0)
    torch.testing.assert_close(out.double(), expected / expected.sum(1, keepdim=True), atol=1e-5, rtol=1e-3)
    # Full surprise and uninformative directions: the prior is the habit, which is uniform at the second window.
    out = Adapter(method("sight:beta=1e9:tau=1e9"), net, x)(x).softmax(1)
    torch.testing.assert_close(out[:2], p[:2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out[3:], p[3:], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        (method, "tnet", "unknown method 'tnet'. Did you mean 'tent'?"),
        (method, "tent:block=0", "method 'tent': block must be at least 1, not 0"),
        *(
            (method, f"{m}:capacity=0", f"method '{m}': capacity must be at least 1")
            for m in ("note", "rotta", "sotta")
        ),
        (affine_parameters, nn.Linear(2, 2), "adaptation of scale and shift needs normalization layers"),
        (
            affine_parameters,
            nn.Sequential(nn.BatchNorm1d(2, affine=False)),
            "have no scale and shift to adapt: build them with affine=True",
        ),
        (features_of, nn.Sequential(nn.Conv1d(2, 2, 1)), "works on the input of a last linear layer"),
    ],
)
def test_bad_input_is_rejected(call, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(value)


class WithUnusedLayer(nn.Module):
    """A network, optionally with a normalization layer that does not run."""

    def __init__(self, unused):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        )
        self.fc = nn.Linear(4, 3)
        if unused:
            self.unused = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.mark.parametrize("name", [n for n in methods() if n != "atp"])
def test_layers_that_do_not_run_do_not_change_predictions(name):
    x = torch.randn(32, 2, 8, generator=torch.Generator().manual_seed(0))
    chosen = method(name)
    found = []
    for unused in (True, False):
        adapter = Adapter(chosen, WithUnusedLayer(unused).eval(), x[:16])
        found.append(torch.cat([adapter(part) for part in x.split(max(2, chosen.block))]))
    if name == "cotta":  # restores random weights of all layers
        torch.testing.assert_close(*found, atol=0.1, rtol=0.1)
    else:
        assert torch.equal(*found)
