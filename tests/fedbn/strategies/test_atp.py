"""ATP: the adaptation step, the learned rates, and the strategy in every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.federation.setup import build_context
from fedbn.nn.roles import clone
from fedbn.strategies.base import strategy
from fedbn.tta import method
from fedbn.tta.adaptation_rates import (
    RATES,
    RatedEntries,
    adapt_state,
    adaptation_step,
    add_rates,
    learn_rates,
    rated_names,
)
from fedbn_simulations.engines.execute import execute
from tests.helpers import same, trained

BLOCK = 8


def network():
    torch.manual_seed(0)
    first, second = (nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU()), (nn.Linear(18, 4), nn.BatchNorm1d(4))
    net = nn.Sequential(*first, nn.Flatten(), *second, nn.Linear(4, 3))
    for layer in (net[1], net[5]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        nn.init.normal_(layer.weight, 1.0)
        nn.init.normal_(layer.bias)
    return add_rates(net).double().eval()


def windows(n=3 * BLOCK, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, generator=draw, dtype=torch.float64) + 1


def examples(n=3 * BLOCK):
    return Examples(windows(n), torch.arange(n) % 3, torch.zeros(n))


def explicit_forward(net, x, state):
    """Forward pass with statistics as ordinary tensors; also returns the input of each BN layer."""
    inputs = []

    def bn(v, at, shape):
        inputs.append(v.detach())
        mean, var, w, b = (state[f"{at}.{k}"].view(shape) for k in ("running_mean", "running_var", "weight", "bias"))
        return (v - mean) / (var + net[at].eps).sqrt() * w + b

    h = nn.functional.conv1d(x, state["0.weight"], state["0.bias"])
    h = bn(h, 1, (1, -1, 1)).relu().flatten(1)
    h = bn(h @ state["4.weight"].T + state["4.bias"], 5, (1, -1))
    return h @ state["6.weight"].T + state["6.bias"], inputs


def explicit_step(net, x, rates):
    """The paper's step, by autograd through every entry."""
    floating = {k: v for k, v in net.state_dict().items() if v.is_floating_point() and k != RATES}
    leaves = {k: v.clone().requires_grad_() for k, v in floating.items()}
    out, inputs = explicit_forward(net, x, leaves)
    p = out.softmax(1)
    g = dict(zip(leaves, torch.autograd.grad(-(p * p.log()).sum(1).mean(), leaves.values()), strict=True))
    for at, v in zip((1, 5), inputs, strict=True):
        rows = v.transpose(0, 1).flatten(1)
        g[f"{at}.running_mean"] = leaves[f"{at}.running_mean"].detach() - rows.mean(1)
        g[f"{at}.running_var"] = leaves[f"{at}.running_var"].detach() - rows.var(1)
    moved = {k: v.detach() - rates[k] * g[k] for k, v in leaves.items()}
    return {k: v.clamp_min(0) if k.endswith("running_var") else v for k, v in moved.items()}, g


def example_rates(net):
    values = torch.linspace(-0.2, 0.3, len(rated_names(net)), dtype=torch.float64)
    return values, dict(zip(rated_names(net), values, strict=True))


def test_adapt_state_matches_explicit_step():
    net, x = network(), windows()
    values, by_name = example_rates(net)
    moved, g = adapt_state(RatedEntries.of(net), clone(net.state_dict()), values, x)
    expected, directions = explicit_step(net, x, by_name)
    assert list(directions) == rated_names(net)
    for name in rated_names(net):
        torch.testing.assert_close((g[name], moved[name]), (directions[name], expected[name]))


def test_adapt_state_keeps_variances_nonnegative():
    net = network()
    high = torch.full((len(rated_names(net)),), 50.0, dtype=torch.float64)
    moved, _ = adapt_state(RatedEntries.of(net), clone(net.state_dict()), high, windows())
    assert moved["1.running_var"].min() == 0


def test_learn_rates_matches_finite_differences():
    net, data = network(), examples(BLOCK)
    values, _ = example_rates(net)
    net.get_buffer(RATES).copy_(values)

    def loss(rates):
        moved, _ = adapt_state(RatedEntries.of(net), clone(net.state_dict()), rates, data.x)
        return nn.functional.cross_entropy(torch.func.functional_call(net, moved, (data.x,)), data.y)

    h, expected = 1e-6, []
    for d, name in enumerate(rated_names(net)):
        nudge = torch.zeros_like(values).index_fill(0, torch.tensor(d), h)
        slope = (loss(values + nudge) - loss(values - nudge)) / (2 * h)
        expected.append(values[d] - 0.1 * slope / net.state_dict()[name].numel() ** 0.5)
    before = clone(net.state_dict())
    learn_rates(net, data, block=BLOCK, lr=0.1)
    after = net.state_dict()
    torch.testing.assert_close(after.pop(RATES), torch.stack(expected), rtol=1e-5, atol=1e-8)
    assert all(torch.equal(v, before[k]) for k, v in after.items()), "the model is frozen"


def test_learn_rates_lowers_training_loss():
    net, data = network(), examples(120)

    def loss():
        step = adaptation_step(net, online=False)
        before = clone(net.state_dict())
        losses = [nn.functional.cross_entropy(step(d.x), d.y) for d in map(data.take, torch.arange(120).split(BLOCK))]
        net.load_state_dict(before)
        return sum(losses) / len(losses)

    initial = loss()
    for _ in range(10):
        learn_rates(net, data, block=BLOCK, lr=0.1)
    assert loss() < initial - 0.05
    assert net.get_buffer(RATES).abs().min() > 0


def test_adaptation_step_averages_adapted_states():
    net = network()
    values, by_name = example_rates(net)
    parts = windows(3 * BLOCK).split(BLOCK)
    states = [explicit_step(network(), x, by_name)[0] for x in parts]
    for online in (True, False):
        fresh = network()
        fresh.get_buffer(RATES).copy_(values)
        step = adaptation_step(fresh, online=online)
        for t, x in enumerate(parts):
            use = {k: sum(s[k] for s in states[: t + 1]) / (t + 1) for k in states[0]} if online else states[t]
            torch.testing.assert_close(step(x), explicit_forward(net, x, use)[0])
        torch.testing.assert_close(fresh.state_dict()["1.running_mean"], use["1.running_mean"])


def test_atp_freezes_model_while_learning_rates(small):
    naive, atp = trained(small("global-naive", rounds=2)), trained(small("atp", rounds=4))
    rates = atp.server.state.pop(RATES)
    assert same(atp.server.state, naive.server.state)
    assert rates.abs().min() > 0


def test_atp_does_not_adapt_without_learned_rates(small):
    out = trained(small("atp:lr=0"))
    assert not out.server.state[RATES].any()
    for cells in out.scores.values():
        by_column = {s.column: s for s in cells if s.row in ("own", "unseen")}
        aggregated, online = by_column["aggregated"], by_column["online"]
        assert online.metrics["loss"] == pytest.approx(aggregated.metrics["loss"], rel=1e-5)
        exact = {name: online.metrics[name] for name in ("accuracy", "macro_f1")}
        assert exact == {name: aggregated.metrics[name] for name in exact}


@pytest.mark.slow
def test_online_column_uses_learned_rates_in_every_engine(small):
    run = small("atp:lr=0.1")
    out = execute(run, "reference")
    assert out.scores == execute(run, "grid").scores
    ctx = build_context(run)
    user = ctx.population.unseen[0]
    model = ctx.load(ctx.assemble(out.server.state, None)).eval()
    test = ctx.population.users[user].test
    outputs = ctx.strategy.predict_stream(model, test.x)
    (cell,) = (s for s in out.scores[user] if (s.row, s.column) == ("unseen", "online"))
    assert cell.metrics["loss"] == float(nn.functional.cross_entropy(outputs.double(), test.y))
    assert cell.metrics["loss"] != next(s.metrics["loss"] for s in out.scores[user] if s.column == "aggregated")
    other = execute(replace(run, rule="ema"), "reference")
    assert [s.metrics["loss"] for s in other.scores[user]] != [s.metrics["loss"] for s in out.scores[user]], (
        "an explicit rule has priority"
    )


def test_atp_rejects_bad_input():
    for text in ("atp:learn=1", "atp:block=1", "atp:lr=-1"):
        with pytest.raises(UserError, match=r"strategy 'atp': learn must lie in \[0, 1\), block be at least 2"):
            strategy(text)
    with pytest.raises(UserError, match="a batch of one window has no variance"):
        method("atp:block=1")
    with pytest.raises(UserError, match="rates have diverged: give a smaller"):
        learn_rates(network(), examples(), block=BLOCK, lr=1e30)
    with pytest.raises(UserError, match="affine=True"):
        add_rates(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)))
    with pytest.raises(UserError, match="no layer that keeps any"):
        add_rates(nn.Linear(2, 2))
    with pytest.raises(UserError, match="train with --strategy atp"):
        method("atp").begin(nn.Linear(2, 2), windows(), torch.Generator())


class Twice(nn.Module):
    """A network whose normalization layer and linear layer run twice, with a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4)] * 2)
        self.lines = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.unused, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        for norm, line in zip(self.norms, self.lines, strict=True):
            x = torch.tanh(norm(line(x)))
        return self.fc(x)


def test_adapt_state_supports_shared_tied_and_unused_layers():
    torch.manual_seed(0)
    net = add_rates(Twice()).double().eval()
    x = torch.randn(8, 4, dtype=torch.float64)
    state = clone(net.state_dict())
    rates = state.pop(RATES).uniform_(0.01, 0.1)
    names = rated_names(net)
    assert not [n for n in names if n.startswith(("norms.1", "lines.1"))]
    inputs = []
    handle = net.norms[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    out = net(x)
    handle.remove()
    loss = -(out.softmax(1) * out.log_softmax(1)).sum(1).mean()
    parameters = dict(net.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    adapted, g = adapt_state(RatedEntries.of(net), state, rates, x)
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(g[name], gradient)
    seen = torch.cat(inputs)  # of both runs
    torch.testing.assert_close(g["norms.0.running_mean"], state["norms.0.running_mean"] - seen.mean(0))
    torch.testing.assert_close(g["norms.0.running_var"], state["norms.0.running_var"] - seen.var(0))
    assert torch.equal(adapted["unused.running_mean"], state["unused.running_mean"])
    net.get_buffer(RATES).copy_(rates)
    adaptation_step(net, online=False)(x)
    assert torch.equal(net.norms[1].weight, adapted["norms.0.weight"])
    learn_rates(net, Examples(x, torch.arange(8) % 3, torch.zeros(8)), block=4, lr=0.1)


def test_add_rates_rejects_shared_scales_and_complex_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    net[2].weight = net[1].weight
    with pytest.raises(UserError, match="a scale and a shift of its own for each BN layer"):
        add_rates(net)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    with pytest.raises(UserError, match="complex parameters"):
        add_rates(net)
