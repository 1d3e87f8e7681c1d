"""A stacked program is used only if it computes what the model computes."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.stacked import check
from fedbn.stacked.check import check_program, checked_program
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import build_program
from fedbn.stacked.vectorized import VectorizedProgram, vectorize


class Net(nn.Module):
    """A function of the hidden features of a network with BN."""

    def __init__(self, function, module=None):
        super().__init__()
        self.module = module
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.function, self.calls, self.seen = function, 0, []
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.last(self.function(self, self.norm(self.first(x))))


class Doubled(nn.ReLU):
    def forward(self, input):
        return 2 * input


def hooked():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_pre_hook(lambda module, args: None)
    return net


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


def plus_one(h):
    h += 1
    return h


def overwritten(change):
    def function(net, h):
        out = change(h)
        return out * h

    return function


@pytest.mark.parametrize(
    "change",
    [
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),  # equal in a check with small activations
        nn.Dropout(0.5, inplace=True),
        nn.Sequential(nn.Flatten(), nn.SiLU(inplace=True)),
        plus_one,
        lambda h: h.mul_(2),
        lambda h: torch.relu_(h),
        lambda h: F.hardswish(h, True),
        lambda h: F.dropout(h, 0.5, False).add_(1),  # the same tensor
        lambda h: h.view(h.size(0), -1).add_(1),
        lambda h: F.leaky_relu(h.unsqueeze(-1), inplace=True).squeeze(-1),
    ],
)
def test_build_program_rejects_overwritten_tensors_that_are_read_again(change):
    with pytest.raises(Unstackable, match="overwritten in place and then read"):
        build_program(Net(overwritten(change), change if isinstance(change, nn.Module) else None))


@pytest.mark.parametrize("change", [plus_one, nn.ReLU(inplace=True), lambda h: h.mul_(2).add_(1)])
def test_build_program_accepts_operations_in_place(change):
    net = Net(lambda net, h: change(h) * 2, change if isinstance(change, nn.Module) else None)
    check_program(build_program(net), net, torch.randn(9, 4))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.PReLU()), "layer PReLU is not supported"),
        (nn.Sequential(nn.BatchNorm1d(4, momentum=None)), "averages cumulatively"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), "pads with circular"),
        (nn.Sequential(nn.MaxPool1d(2, return_indices=True)), "returns indices"),
        (hooked(), "has hooks"),
        (tied(), "share parameters"),
        (Net(lambda net, h: h + net.scale), "scale, a tensor that no supported layer owns"),
        (Net(lambda net, h: h + net.norm.running_mean), "a tensor that no supported layer owns"),
        (Net(lambda net, h: h * float(net.norm.running_mean.sum())), "cannot be traced"),
        (Net(lambda net, h: h if h.sum() > 0 else -h), "cannot be traced"),
        (Net(lambda net, h: h + torch.rand(4)), "random numbers"),
        (Net(lambda net, h: torch.add(h, 1, out=h)), "writes to a given tensor"),
        (Net(lambda net, h: h.sort()[0]), "method sort is not supported"),
        (Net(lambda net, h: torch.sort(h)[0]), "function sort is not supported"),
        (nn.Sequential(Doubled(), nn.Threshold(0, 1)), "layer Threshold"),
    ],
)
def test_build_program_rejects_unsupported_models(model, reason):
    with pytest.raises(Unstackable, match=reason):
        build_program(model)


def test_programs_follow_a_subclass_and_ignore_unused_layers():
    net = Net(lambda net, h: net.extra(h))
    net.extra, net.unused = Doubled(), nn.BatchNorm1d(9)
    check_program(build_program(net), net, torch.randn(9, 4))


def without_gradient(net, h):
    with torch.no_grad():
        return h * 2


def counts(net, h):
    net.calls += 1
    return h


def remembers(net, h):
    net.seen.append(1)
    return h


def draws(net, h):
    return h * (1 if random.random() < 2 else 0)


def draws_with_numpy(net, h):
    return h * (1 if np.random.rand() < 2 else 0)


def clips_weights(net, h):
    net.scale.data.clamp_(-9, 9)
    return h


@pytest.mark.parametrize("build", [build_program, lambda net: vectorize(net, torch.randn(9, 4))])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (counts, "changes attributes"),
        (remembers, "changes attributes"),
        (draws, "draws from a global generator"),
        (draws_with_numpy, "draws from a global generator"),
    ],
)
def test_check_program_rejects_hidden_state(build, function, reason):
    net = Net(function)
    program = build(net)
    with pytest.raises(Unstackable, match=reason):
        check_program(program, net, torch.randn(9, 4))


@pytest.mark.parametrize("function", [without_gradient, lambda net, h: h + without_gradient(net, h)])
def test_check_program_compares_gradients(function):
    net = Net(function)
    with pytest.raises(Unstackable, match="differs? from"):
        check_program(build_program(net), net, torch.randn(9, 4))
    assert isinstance(checked_program(net, torch.randn(9, 4), trains=True), VectorizedProgram)


def test_check_program_rejects_weights_changed_in_forward():
    with pytest.raises(Unstackable):
        checked_program(Net(clips_weights), torch.randn(9, 4), trains=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: h - h.mean(0),
        lambda net, h: F.batch_norm(h, None, None, training=True),
        lambda net, h: h.cumsum(0),
        lambda net, h: h.flip(0).cumsum(0).flip(0),
    ],
)
def test_checked_program_rejects_rows_that_depend_on_each_other_in_evaluation(function):
    with pytest.raises(Unstackable, match="rows of a batch depend on each other"):
        checked_program(Net(function).eval(), torch.randn(9, 4), trains=False)
    checked_program(Net(function).train(), torch.randn(9, 4), trains=True)


def test_checked_program_rejects_normalization_of_merged_rows_in_evaluation():
    class Steps(nn.Sequential):
        def forward(self, x):
            return super().forward(x.reshape(-1, 4)).reshape(len(x), -1)

    net = Steps(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(Unstackable, match="one entry per row"):
        checked_program(net.eval(), torch.randn(9, 8), trains=False)
    checked_program(net.train(), torch.randn(9, 8), trains=True)


def test_check_program_leaves_the_model_unchanged():
    net = Net(lambda net, h: F.dropout(h, 0.5))
    before, x = {n: v.clone() for n, v in net.state_dict().items()}, torch.randn(9, 4)
    random_state = torch.get_rng_state()
    checked_program(net, x, trains=True)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_checked_program_checks_models_that_differ_in_weights_once(monkeypatch):
    checked = []
    monkeypatch.setattr(check, "check_program", lambda program, model, x, trains: checked.append(model))

    def build(p=0.5):
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(p))

    x, first, second = torch.randn(9, 4), build(), build()
    checked_program(first, x, trains=True)
    first.eval()
    program = checked_program(second, x, trains=True)
    assert checked == [first], "the mode in which the first one was checked counts"
    assert {id(layer.module) for layer in program.layers.values()} == {id(m) for m in second}
    frozen = build()
    frozen[0].requires_grad_(False)
    others = [build(0.1), build().eval(), build().double(), frozen]
    for net in others:
        checked_program(net, x.to(net[0].weight.dtype), trains=True)
    checked_program(second, x, trains=False)
    assert checked == [first, *others, second]


def test_checked_program_remembers_why_there_is_none(monkeypatch):
    first, second = Net(clips_weights), Net(clips_weights)
    with pytest.raises(Unstackable) as reason:
        checked_program(first, torch.randn(9, 4), trains=True)
    monkeypatch.setattr(check, "check_program", None)
    with pytest.raises(Unstackable, match=re.escape(str(reason.value))):
        checked_program(second, torch.randn(9, 4), trains=True)
