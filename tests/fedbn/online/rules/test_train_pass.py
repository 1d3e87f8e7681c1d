"""Option ``pass=train`` against PyTorch's BN in training mode, on a deep network and unequal batches of two users."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedbn.online import personalize, rule
from fedbn.plugins import render

SIZES = ((3, 1), (1, 4), (6, 0), (2, 5))
"""Rows of the two users in each call."""


def network():
    torch.manual_seed(0)
    layers = (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.ReLU())
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)).double().eval()
    for bn in (net[1], net[4]):
        nn.init.uniform_(bn.weight, 0.5, 2)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 3)
    return net


def calls():
    draw = torch.Generator().manual_seed(1)
    for i, (a, b) in enumerate(SIZES):
        x = torch.randn(a + b, 2, 7, generator=draw, dtype=torch.float64) * (1 + i) + 0.5 * i
        users = ["ann"] * a + ["bob"] * b
        order = torch.randperm(a + b, generator=draw)
        yield x[order], [users[j] for j in order]


def train_pass(model, x, gain, source, *, between=False, leash=0.0):
    """Update running statistics from the inputs that BN layers get in PyTorch's training mode."""
    inputs, training = {}, copy.deepcopy(model).train()
    for i in (1, 4):
        training[i].register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0].detach()))
    training(x)
    for i in (1, 4):
        h, bn = inputs[i].transpose(0, 1).flatten(1), model[i]
        mean, var = h.mean(1), h.var(1, correction=0 if between else 1)
        extra = gain * (1 - gain) * (mean - bn.running_mean) ** 2 if between else 0
        bn.running_var = (1 - gain) * bn.running_var + gain * var + extra
        bn.running_mean = (1 - gain) * bn.running_mean + gain * mean
        std, std0 = bn.running_var.sqrt(), source[i].running_var.sqrt()
        bn.running_var = (std - 2 * leash * (std - std0)) ** 2
        bn.running_mean = bn.running_mean - 2 * leash * (bn.running_mean - source[i].running_mean)


@pytest.mark.parametrize(
    ("text", "gain", "options"),
    [
        ("dua:pass=train", lambda t: 0.1 * 0.94 ** (t + 1) + 0.005, {}),
        ("onda:pass=train", lambda t: 0.1, {}),
        ("ema:rate=0.2:form=within:pass=train", lambda t: 0.2, {}),
        ("ema:rate=0.2:pass=train", lambda t: 0.2, {"between": True}),
        ("resitta:rate=0.3:leash=0.03:pass=train", lambda t: 0.3, {"leash": 0.03}),
    ],
)
def test_train_pass_matches_pytorch(text, gain, options):
    source = network()
    net, models, steps = personalize(source, text), {}, {"ann": 0, "bob": 0}
    for x, users in calls():
        expected = torch.empty(len(x), 3, dtype=torch.float64)
        for user in dict.fromkeys(users):
            rows = [i for i, u in enumerate(users) if u == user]
            model = models.setdefault(user, copy.deepcopy(source))
            expected[rows] = model(x[rows]).detach()  # predicted with the running statistics, then updated
            train_pass(model, x[rows], gain(steps[user]), source, **options)
            steps[user] += 1
        torch.testing.assert_close(net(x, user=users), expected, rtol=1e-10, atol=1e-10)
    for user, model in models.items():
        for i in (1, 4):
            expected = model[i].running_mean, model[i].running_var
            torch.testing.assert_close(net.statistics(user)[str(i)], expected, rtol=1e-10, atol=1e-10)


def test_passes_differ_in_deeper_layers_only():
    one, other = (personalize(network(), f"onda{option}") for option in ("", ":pass=train"))
    for x, users in calls():
        one(x, user=users)
        other(x, user=users)
    for user in ("ann", "bob"):
        a, b = one.statistics(user), other.statistics(user)
        torch.testing.assert_close(a["1"], b["1"])
        assert not torch.allclose(a["4"][1], b["4"][1], rtol=0.05)


def test_train_pass_of_a_single_value_keeps_the_user_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double().eval()
    x = torch.randn(6, 2, dtype=torch.float64)
    single, plain = (personalize(net, f"onda{option}") for option in ("", ":pass=train"))
    for row in x:
        single(row[None], user=1)
        plain(row[None], user=1)
    torch.testing.assert_close(single.statistics(1), plain.statistics(1))
    one_by_one, together = (personalize(net, "onda:pass=train", duplicates=d) for d in ("sequential", "merge"))
    one_by_one(x, user=[1] * 6)
    together(x, user=[1] * 6)
    torch.testing.assert_close(one_by_one.statistics(1), plain.statistics(1))
    assert not torch.allclose(together.statistics(1)["3"][0], plain.statistics(1)["3"][0])


def test_frozen_rule_runs_one_pass(monkeypatch):
    net = personalize(network(), "dua:pass=train")
    (x, users), *_ = calls()
    net.predict(x, user=users)  # the first windows also test whether rows are independent
    passes = []
    monkeypatch.setattr(net.model, "forward", lambda rows, run=net.model.forward: (passes.append(1), run(rows))[1])
    net(x, user=users)
    assert len(passes) == 2
    with net.frozen():
        net(x, user=users)
    assert len(passes) == 3


def test_option_named_like_a_keyword_round_trips():
    assert rule("dua:pass=train").pass_ == "train"
    assert render(rule("dua:pass=train:decay=0.9")) in ("dua:decay=0.9:pass=train", "dua:pass=train:decay=0.9")
    assert render(rule("dua:pass=eval")) == "dua"
