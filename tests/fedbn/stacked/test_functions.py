"""Stacked functions and methods equal those of separate models: outputs, gradients and statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.stacked.check import check_program
from fedbn.stacked.functions import FEATURE_FUNCTIONS, FUNCTIONS, IN_PLACE_FUNCTIONS, METHODS, VIEW_FUNCTIONS
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import build_program
from tests.fedbn.stacked.programs import assert_program_matches


class Block(nn.Module):
    """A function of normalized activations ``[B, 4, 6, 5]``, from inputs ``[B, 2, 7, 6]``."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(2, 4, (4, 2), padding=(1, 0)), nn.BatchNorm2d(4), function

    def forward(self, x):
        return self.function(self.norm(self.conv(x)))


class Features(Block):
    """The same with activations ``[B, 4]``, from inputs ``[B, 5]``."""

    def __init__(self, function):
        super().__init__(function)
        self.conv, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)


def plus_one(h):
    h += 1
    return h


def all_operators_in_place(h):
    h += 1.5
    h -= h.detach() * 0.1
    h *= 2
    h /= 3
    h **= 2
    return h


SIGNAL = {  # functions of [B, 4, 30]
    "max_pool1d": lambda h: F.max_pool1d(h, 3, 2, 1, 2, ceil_mode=True),
    "avg_pool1d": lambda h: F.avg_pool1d(h, 4, 3, 1, True, False),
    "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(h, 7),
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h, 7),
    "dropout1d": lambda h: F.dropout1d(h, 0.4),
}
IMAGE = {
    "max_pool2d": lambda h: F.max_pool2d(h, (3, 2), (2, 1), 1, ceil_mode=True),
    "max_pool2d dilated": lambda h: F.max_pool2d(h, 2, stride=1, dilation=(2, 1)),
    "avg_pool2d": lambda h: F.avg_pool2d(h, (3, 2), (2, 1), 1, True, False),
    "avg_pool2d with padding": lambda h: F.avg_pool2d(h, (3, 2), padding=(1, 1), count_include_pad=True),
    "avg_pool2d with divisor": lambda h: F.avg_pool2d(h, 3, ceil_mode=True, divisor_override=2),
    "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(h, (4, None)),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h, (2, 3)),
    "interpolate": lambda h: F.interpolate(h, scale_factor=2.0, mode="bilinear"),
    "pad": lambda h: F.pad(h, (1, 2, 0, 1), value=0.5) + F.pad(h, (1, 2, 1, 0), "replicate"),
    "shrink": lambda h: F.hardshrink(h) + F.softshrink(h) + F.tanhshrink(h),
    "cat of channels": lambda h: torch.cat([h, 2 * h, h[:, :1]], 1),
    "cat of positions": lambda h: torch.concat((h, h), dim=-1),
    "concatenate": lambda h: torch.concatenate([h, h], -3),
    "channel gate": lambda h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "one-channel map": lambda h: h + h[:, 1:2],
    "mean over channels": lambda h: h / (1 + h.mean(1, keepdim=True).abs()),
    "maximum": lambda h: torch.maximum(h, torch.minimum(h[:, :, :, :1], -h)),
    "mean": lambda h: torch.mean(h, [-1, -2]),
    "sum": lambda h: torch.sum(h, (1, 2)),
    "extrema": lambda h: torch.amax(h, 3) - torch.amin(h, -1),
    "methods": lambda h: h.sum(1, keepdim=True) - h.amax((1, 2), keepdim=True) + h.amin(3, keepdim=True),
    "view": lambda h: h.view(h.size(0), -1),
    "view with rows inferred": lambda h: h.view(-1, 4, 30),
    "reshape": lambda h: torch.reshape(h, (h.shape[0], 2, h.shape[1] // 2, 30)),
    "reshape to groups": lambda h: h.reshape(h.size()[0], 3, 2, -1).transpose(1, 2),
    "flatten": lambda h: h.flatten(1, 2),
    "flatten positions": lambda h: torch.flatten(h, 2),
    "permute": lambda h: h.permute(0, 2, 3, 1),
    "permute function": lambda h: torch.permute(h, (0, 3, 1, 2)).contiguous(),
    "transpose": lambda h: torch.transpose(h, 1, -1),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "unsqueeze last": lambda h: torch.unsqueeze(h, -1).clone(),
    "squeeze": lambda h: torch.squeeze(h[:, :1], 1),
    "squeeze last": lambda h: h.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "slices": lambda h: h[:, ::2, ..., -1],
    "position": lambda h: h[:, :, 2],
    "shape": lambda h: h * h.shape[2] + h.size(3) * h.dim() + h.ndim,
    "softmax": lambda h: F.softmax(h, 1) + torch.softmax(h, -1) + h.softmax(2),
    "log_softmax": lambda h: F.log_softmax(h, dim=1) + torch.log_softmax(h, 3) * h.log_softmax(dim=1),
    "detach": lambda h: h * h.detach(),
    "dropout": lambda h: F.dropout(h, 0.4),
    "dropout in evaluation": lambda h: F.dropout(h, 0.4, False),
    "dropout2d": lambda h: F.dropout2d(h, 0.4),
    "operators in place": all_operators_in_place,
    "methods in place": lambda h: h.add_(1.5).mul_(2).sub_(0.1, alpha=2).div_(3).pow_(2),
    "relu in place": lambda h: F.relu(torch.relu_(h + 1) - 1.5, inplace=True),
    "arithmetic": lambda h: (
        torch.add(h, h, alpha=2) - torch.mul(h, torch.sub(1.5, h)) / torch.div(h.abs() + 7, 3) ** -h.tanh()
    ),
    "arithmetic methods": lambda h: h.add(1).sub(h).mul(h).div(3).pow(2).maximum(h).minimum(h.abs()),
    "powers": lambda h: torch.pow(h.abs() + 1, h.tanh()) - 2,
    "pooling of volumes": lambda h: F.max_pool3d(h.unsqueeze(2), (1, 2, 2)) + F.avg_pool3d(h.unsqueeze(2), (1, 2, 2)),
    "adaptive pooling of volumes": lambda h: (
        F.adaptive_max_pool3d(h.unsqueeze(2), (1, 2, 2))
        + F.adaptive_avg_pool3d(h.unsqueeze(-1), (2, 2, 1)).transpose(2, 4)
    ),
    "dropout3d": lambda h: F.dropout3d(h.unsqueeze(2), 0.3),
}
ELEMENTWISE = {f: (lambda h, f=f: f(h.tanh().abs() + 0.1)) for f in FUNCTIONS if f in FEATURE_FUNCTIONS} | {
    name: (lambda h, name=name: getattr(h.tanh().abs() + 0.1, name)())
    for name in METHODS
    if name.removesuffix("_") in FEATURE_FUNCTIONS
}
"""Functions of one tensor; those of several tensors and `clamp` are above."""


def is_unary(function):
    name = function if isinstance(function, str) else function.__name__
    return name.removesuffix("_").removeprefix("i") not in (
        *("add", "sub", "mul", "div", "pow", "truediv", "floordiv", "maximum", "minimum", "clamp"),
    )


def nets():
    """(name, network, shape of an input) for every function."""
    yield from ((name, Block(lambda h, f=f: f(h.flatten(2))), (2, 7, 6)) for name, f in SIGNAL.items())
    yield from ((name, Block(f), (2, 7, 6)) for name, f in IMAGE.items())
    unary = {f: make for f, make in ELEMENTWISE.items() if is_unary(f)}
    for i, (f, make) in enumerate(unary.items()):  # torch.relu, functional.relu and the method share a name
        yield f"features {i} " + getattr(f, "__name__", f), Features(make), (5,)
    clamps = {"clamp": lambda h: torch.clamp(h, -1, max=0.5) * h.clamp(min=0.1), "clamp_": lambda h: h.clamp_(0, 1)}
    yield from ((name, Features(f), (5,)) for name, f in clamps.items())
    yield "features dropout", Features(lambda h: F.dropout(h, 0.4) * h + h.tanh() / 3), (5,)


NETS = {name: (net, shape) for name, net, shape in nets()}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stacked_function_matches_separate_models(name, training):
    net, shape = NETS[name]
    torch.manual_seed(1)
    program = build_program(net.double().train(training))
    assert_program_matches(program, net, shape)
    assert not name.startswith("features") or program.supports_batch_last(2)


def test_tests_cover_every_function():
    used = {node.target for net, _ in NETS.values() for node in build_program(net).graph.nodes}
    assert set(FUNCTIONS) | set(METHODS) <= used
    assert set(FUNCTIONS) | set(METHODS) >= FEATURE_FUNCTIONS | VIEW_FUNCTIONS | IN_PLACE_FUNCTIONS


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.flatten(0), "merges the rows"),
        (lambda x: x.flatten(0, 1), "merges the rows"),
        (lambda x: x.mean(0), "along the batch"),
        (lambda x: x.mean(-3), "along the batch"),
        (lambda x: x.mean(), "over all axes"),
        (lambda x: x.mean((1, 2)), "one value per row"),
        (lambda x: x[:, 0, 0], "one value per row"),
        (lambda x: x.view(-1, 2), "may merge rows"),
        (lambda x: x.view(-1), "may merge rows"),
        (lambda x: x.view(x.size(1), -1), "may merge rows"),
        (lambda x: x.reshape(-1, 8, 2), "may merge rows"),
        (lambda x: x.unsqueeze(0), "along the batch"),
        (lambda x: x.squeeze(), "may remove the batch"),
        (lambda x: x.transpose(0, 1), "along the batch"),
        (lambda x: x.permute(1, 0, 2), "moves the batch"),
        (lambda x: torch.cat([x, x]), "along the batch"),
        (lambda x: x.softmax(0), "along the batch"),
        (lambda x: F.softmax(x, 1, dtype=torch.float64), "with a dtype"),
        (lambda x: x[0], "selects rows"),
        (lambda x: x[:2], "selects rows"),
        (lambda x: x[:, [0, 1]], "index tensor"),
        (lambda x: x.mT, "attribute mT"),
        (lambda x: x + x.unsqueeze(1), "different numbers of axes"),
        (lambda x: F.max_pool2d(x, 2), "without a batch axis"),
        (lambda x: F.pad(x, (0, 0, 1, 1)), "padding of channels"),
    ],
)
def test_program_rejects_operations_that_mix_rows_or_clients(function, reason):
    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(Unstackable, match=reason):
        build_program(Net()).bind({}, 2)(torch.zeros(3, 8, 2))


def test_linear_layers_need_features():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(Unstackable, match="with 3 axes"):
        build_program(net).bind(net.state_dict(), 1)(torch.zeros(3, 4, 2))


@pytest.mark.parametrize("function", [lambda h: h.flatten(1), lambda h: plus_one(h).flatten(1)])
def test_check_program_accepts_stacked_functions(function):
    net = nn.Sequential(Block(function), nn.Linear(120, 3))
    check_program(build_program(net), net, torch.randn(9, 2, 7, 6))
