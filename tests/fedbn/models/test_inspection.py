"""The head and the logits of a network are found from its computation."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fedbn.models import build
from fedbn.models.inspection import head_notice, inspect_model
from fedbn.nn.outputs import logits_name
from fedbn.nn.roles import Role, head, roles, set_head
from tests.fedbn.helpers import rejects

SHAPE, CLASSES = (3,), 4


class Net(nn.Module):
    """Layers registered in an unusual order, and a forward pass given as a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.add_module(name, layer)
        self.body = nn.Linear(3, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.function(self, torch.relu(self.body(x)))


def linear(features=5):
    return nn.Linear(features, CLASSES)


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = parameter(CLASSES, 5), parameter()

    def forward(self, h):
        return self.scale * F.linear(F.normalize(h), F.normalize(self.weight))


class Tied(Net):
    def __init__(self, forward):
        super().__init__(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 5))
        self.b.weight = self.a.weight


HEADS = {
    "registered first": (lambda: Net(lambda net, h: net.fc(h), fc=linear()), ("fc",)),
    "normalized": (lambda: Net(lambda net, h: net.bn(net.fc(h)), fc=linear(), bn=nn.BatchNorm1d(CLASSES)), ("fc",)),
    "prefix": (lambda: Net(lambda net, h: net.head(net.head2(h)), head=linear(), head2=nn.Linear(5, 5)), ("head",)),
    "nested": (lambda: Net(lambda net, h: net.fc(h), fc=nn.Sequential(nn.Linear(5, 5), linear())), ("fc.1",)),
    "pooled": (
        lambda: Net(lambda net, h: net.fc(h[:, :, None]).mean(2), fc=nn.Conv1d(5, CLASSES, 1)),
        ("fc",),
    ),
    "parametrized": (lambda: Net(lambda net, h: net.fc(h), fc=parametrizations.weight_norm(linear())), ("fc",)),
    "own layer": (lambda: Net(lambda net, h: net.fc(h), fc=Cosine()), ("fc",)),
    "functional": (
        lambda: Net(lambda net, h: F.linear(h, net.w, net.b), w=parameter(CLASSES, 5), b=parameter(CLASSES)),
        ("w", "b"),
    ),
    "prototypes": (
        lambda: Net(lambda net, h: -torch.cdist(h, net.centers), centers=parameter(CLASSES, 5)),
        ("centers",),
    ),
    "scaled": (lambda: Net(lambda net, h: net.t * net.fc(h), t=parameter(), fc=linear()), ("t", "fc")),
    "recurrent": (lambda: Net(lambda net, h: net.rnn(h[:, None])[0][:, 0], rnn=nn.LSTM(5, CLASSES)), ("rnn",)),
    "detached": (lambda: Net(lambda net, h: net.fc(h.detach()), fc=linear()), ("fc",)),
    "frozen": (lambda: Net(lambda net, h: net.fc(h), fc=linear()).requires_grad_(False), ("fc",)),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_is_found_from_the_computation(name):
    make, expected = HEADS[name]
    torch.manual_seed(0)
    net = make()
    before = [(p.requires_grad, p.detach().clone()) for p in net.parameters()]
    inspect_model(net, SHAPE, CLASSES)
    assert head(net) == expected
    assert not head_notice(net)
    assert all(p.requires_grad is r and torch.equal(p, v) for p, (r, v) in zip(net.parameters(), before, strict=True))
    assert net.training


def test_head_does_not_match_paths_with_the_same_prefix():
    net = inspect_model(HEADS["prefix"][0](), SHAPE, CLASSES)
    assert {k for k, r in roles(net).items() if r is Role.HEAD} == {"head.weight", "head.bias"}


AMBIGUOUS = {
    "parallel": (
        lambda: Net(lambda net, h: net.a(h) + net.b(h), a=linear(), b=linear()),
        ("a", "b"),
        "several layers compute the logits side by side",
    ),
    "training": (
        lambda: Net(lambda net, h: net.a(h) + net.b(h) if net.training else net.a(h), a=linear(), b=linear()),
        ("a",),
        "in training, the logits also come from b",
    ),
    "outputs": (
        lambda: Net(lambda net, h: (h, net.fc(h)), fc=linear()),
        ("fc",),
        "returns 2 outputs, of which '1' is used",
    ),
    "tied": (lambda: Tied(lambda net, h: net.b(net.a(h))[:, :CLASSES]), ("a", "b"), "also those of b.weight"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_head_has_one_notice(name):
    make, expected, reason = AMBIGUOUS[name]
    net = inspect_model(make(), SHAPE, CLASSES)
    assert head(net) == expected
    assert reason in head_notice(net)
    assert f"Treated as the head: {', '.join(expected)}; --head names others" in head_notice(net)
    chosen = inspect_model(make(), SHAPE, CLASSES, ("body",))
    assert head(chosen) == ("body",)
    assert not head_notice(chosen)


def test_set_head_rejects_unknown_paths():
    rejects("unknown layer for head 'hed'. Did you mean 'head'", set_head, HEADS["prefix"][0](), ["hed"])


Named = namedtuple("Named", ["aux", "logits"])


@dataclass
class Fields:
    hidden: Any
    logits: Any


def wrong(h):
    return torch.full((len(h), CLASSES), -1.0)


OUTPUTS = {
    "tuple": lambda net, h: (h, net.fc(h)),
    "list": lambda net, h: [net.fc(h), h],
    "dict": lambda net, h: {"features": h, "logits": net.fc(h), "other": wrong(h)},
    "nested": lambda net, h: {"out": {"logits": net.fc(h)}, "states": (wrong(h), None)},
    "namedtuple": lambda net, h: Named(wrong(h), net.fc(h)),
    "dataclass": lambda net, h: Fields(wrong(h), net.fc(h)),
    "only in training": lambda net, h: (wrong(h), net.fc(h)) if net.training else net.fc(h),
    "only in evaluation": lambda net, h: net.fc(h) if net.training else Named(wrong(h), net.fc(h)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_logits_are_found_among_outputs(name):
    net = inspect_model(Net(OUTPUTS[name], fc=linear()), SHAPE, CLASSES)
    assert type(net).__name__ == "Net"
    assert isinstance(net, Net)
    x = torch.randn(6, 3)
    expected = net.fc(torch.relu(net.body(x)))
    for mode in (True, False):
        assert torch.equal(net.train(mode)(x), expected)


def test_ambiguous_logits_are_refused_or_chosen_by_the_head():
    def make():
        return Net(lambda net, h: (net.a(h), net.b(h)), a=linear(), b=linear())

    message = (
        r"several outputs \('0' \[2, 4\], '1' \[2, 4\]\), of which 2 can be the logits for 4 classes.*'logits'.*--head"
    )
    rejects(message, inspect_model, make(), SHAPE, CLASSES)
    net, x = inspect_model(make(), SHAPE, CLASSES, ("b",)), torch.randn(6, 3)
    assert torch.equal(net(x), net.b(torch.relu(net.body(x))))
    rejects("a NoneType without tensors: it must return logits", logits_name, None, 4)
    rejects("of which none can be the logits", logits_name, (torch.zeros(2, 3), torch.zeros(2, 5)), 4)


def test_build_initializes_lazy_layers_by_seed(register_model):
    text = register_model(
        lambda classes: nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(classes))
    )
    nets = [build(text, SHAPE, CLASSES, seed) for seed in (0, 0, 1)]
    first, same, other = (net.state_dict() for net in nets)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert float(first["1.running_mean"].abs().sum()) == 0
    assert nets[0].training
    assert head(nets[0]) == ("3",)
    rejects("uninitialized lazy layers.*run one batch", build, text, (), CLASSES, 0)
