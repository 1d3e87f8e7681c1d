"""ATP: the step is the paper's, the rates are its gradient, and without rates nothing happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.nn.roles import clone
from fedbn.strategies.base import strategy
from fedbn.tta import method
from fedbn.tta.adaptation_rates import RATES, adapted, add_rates, follower, learn_rates, rated
from simulations.engines.execute import execute
from tests.helpers import same

BLOCK = 8


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4)
    )
    net.append(nn.Linear(4, 3))
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


def spelt_out(net, x, state):
    """The same network with statistics as ordinary tensors, and what each BN layer met."""
    met = []

    def bn(v, at, shape):
        met.append(v.detach())
        mean, var, w, b = (state[f"{at}.{k}"].view(shape) for k in ("running_mean", "running_var", "weight", "bias"))
        return (v - mean) / (var + net[at].eps).sqrt() * w + b

    h = nn.functional.conv1d(x, state["0.weight"], state["0.bias"])
    h = bn(h, 1, (1, -1, 1)).relu().flatten(1)
    h = bn(h @ state["4.weight"].T + state["4.bias"], 5, (1, -1))
    return h @ state["6.weight"].T + state["6.bias"], met


def one_step(net, x, rates):
    """The paper's step, by autograd through every entry."""
    leaves = {
        k: v.clone().requires_grad_() for k, v in net.state_dict().items() if v.is_floating_point() and k != RATES
    }
    out, met = spelt_out(net, x, leaves)
    p = out.softmax(1)
    g = dict(zip(leaves, torch.autograd.grad(-(p * p.log()).sum(1).mean(), leaves.values()), strict=True))
    for at, v in zip((1, 5), met, strict=True):
        rows = v.transpose(0, 1).flatten(1)
        g[f"{at}.running_mean"] = leaves[f"{at}.running_mean"].detach() - rows.mean(1)
        g[f"{at}.running_var"] = leaves[f"{at}.running_var"].detach() - rows.var(1)
    moved = {k: v.detach() - rates[k] * g[k] for k, v in leaves.items()}
    return {k: v.clamp_min(0) if k.endswith("running_var") else v for k, v in moved.items()}, g


def some_rates(net):
    values = torch.linspace(-0.2, 0.3, len(rated(net)), dtype=torch.float64)
    return values, dict(zip(rated(net), values, strict=True))


def test_the_step_is_the_paper_s_spelt_out():
    net, x = network(), windows()
    values, by_name = some_rates(net)
    moved, g = adapted(net, clone(net.state_dict()), values, x)
    wanted, directions = one_step(net, x, by_name)
    assert list(directions) == rated(net)
    for name in rated(net):
        torch.testing.assert_close(g[name], directions[name])
        torch.testing.assert_close(moved[name], wanted[name])


def test_variances_stay_positive():
    net = network()
    high = torch.full((len(rated(net)),), 50.0, dtype=torch.float64)
    moved, _ = adapted(net, clone(net.state_dict()), high, windows())
    assert moved["1.running_var"].min() == 0


def test_rates_move_by_the_slope_of_the_loss_after_the_step():
    net, data = network(), examples(BLOCK)
    values, _ = some_rates(net)
    net.get_buffer(RATES).copy_(values)

    def loss(rates):
        moved, _ = adapted(net, clone(net.state_dict()), rates, data.x)
        return nn.functional.cross_entropy(torch.func.functional_call(net, moved, (data.x,)), data.y)

    h, wanted = 1e-6, []
    for d, name in enumerate(rated(net)):
        nudge = torch.zeros_like(values).index_fill(0, torch.tensor(d), h)
        slope = (loss(values + nudge) - loss(values - nudge)) / (2 * h)
        wanted.append(values[d] - 0.1 * slope / net.state_dict()[name].numel() ** 0.5)
    before = clone(net.state_dict())
    learn_rates(net, data, block=BLOCK, lr=0.1)
    after = net.state_dict()
    torch.testing.assert_close(after.pop(RATES), torch.stack(wanted), rtol=1e-5, atol=1e-8)
    assert all(torch.equal(v, before[k]) for k, v in after.items()), "the model rests"


def test_learnt_rates_lower_the_loss_that_they_were_learnt_on():
    net, data = network(), examples(120)

    def loss():
        step = follower(net, online=False)
        before = clone(net.state_dict())
        found = [nn.functional.cross_entropy(step(d.x), d.y) for d in map(data.take, torch.arange(120).split(BLOCK))]
        net.load_state_dict(before)
        return sum(found) / len(found)

    cold = loss()
    for _ in range(10):
        learn_rates(net, data, block=BLOCK, lr=0.1)
    assert loss() < cold - 0.05
    assert net.get_buffer(RATES).abs().min() > 0


def test_a_follower_answers_with_the_mean_of_states_that_all_set_out_from_the_model():
    net = network()
    values, by_name = some_rates(net)
    net.get_buffer(RATES).copy_(values)
    parts = windows(3 * BLOCK).split(BLOCK)
    states = [one_step(network(), x, by_name)[0] for x in parts]
    for online in (True, False):
        fresh = network()
        fresh.get_buffer(RATES).copy_(values)
        step = follower(fresh, online=online)
        for t, x in enumerate(parts):
            use = {k: sum(s[k] for s in states[: t + 1]) / (t + 1) for k in states[0]} if online else states[t]
            torch.testing.assert_close(step(x), spelt_out(net, x, use)[0])
        torch.testing.assert_close(fresh.state_dict()["1.running_mean"], use["1.running_mean"])


def test_while_rates_are_learnt_the_model_rests(small):
    short, whole = federate(small("global-naive", rounds=2)), federate(small("atp", rounds=4))
    rates = whole.server.state.pop(RATES)
    assert same(whole.server.state, short.server.state)
    assert rates.abs().min() > 0
    assert (rates < 0).any()


def test_rates_that_are_never_learnt_follow_nobody(small):
    out = federate(small("atp:lr=0"))
    assert not out.server.state[RATES].any()
    for cells in out.scores.values():
        by_column = {s.column: s for s in cells if s.row in ("own", "unseen")}
        kept, online = by_column["aggregated"], by_column["online"]
        assert online.loss == pytest.approx(kept.loss, rel=1e-5)
        assert replace(online, column="aggregated", loss=kept.loss) == kept


def test_the_online_column_follows_by_the_rates_and_is_the_same_in_every_engine(small):
    run = small("atp:lr=0.1")
    out = execute(run, "reference")
    assert out.scores == execute(run, "grid").scores
    ctx = build_context(run)
    user = ctx.population.unseen[0]
    model = ctx.load(ctx.assemble(out.server.state, None)).eval()
    said = ctx.strategy.predict_stream(model, ctx.population.users[user].test.x)
    y = ctx.population.users[user].test.y
    (cell,) = (s for s in out.scores[user] if (s.row, s.column) == ("unseen", "online"))
    assert cell.loss == float(nn.functional.cross_entropy(said.double(), y))
    assert cell.loss != next(s.loss for s in out.scores[user] if s.column == "aggregated")
    other = execute(replace(run, rule="ema"), "reference")
    assert [s.loss for s in other.scores[user]] != [s.loss for s in out.scores[user]], "a rule of one's own wins"


def test_what_cannot_be_is_said():
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
