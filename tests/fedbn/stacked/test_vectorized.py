"""Programs by ``torch.vmap`` equal separate models, for layers and Python code that a trace does not support."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.stacked.check import checked_program
from fedbn.stacked.layers import STACKED_LAYERS, Unstackable
from fedbn.stacked.vectorized import VectorizedProgram, vectorize
from tests.fedbn.stacked.programs import assert_program_matches
from tests.fedbn.stacked.test_functions import Block


class Tokens(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 3, **options), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.embedding(x.long()).mean(1))


class Scaled(Block):
    """Activations times a parameter per channel, plus a buffer that is one value."""

    def __init__(self):
        super().__init__(lambda h: h * self.scale + self.shift)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.tensor(0.5))


def overwrite_slice(h):
    h[:, :2] = 0
    return h


def overwrite_rows(h):
    view = h[:, 1:3]
    view *= 2
    return h


def overwrite_alias(h):
    alias = nn.Identity()(h)
    alias.mul_(h.detach() + 1)
    return h + alias


def without_gradient(h):
    with torch.no_grad():
        scale = h.mean((2, 3), keepdim=True)
    return h * scale


def reads_again(overwrite):
    def function(h):
        out = overwrite(h)
        return out * 2 + h

    return function


def attention(h):
    tokens = h.flatten(2).mT
    return torch.einsum("bij,bjc->bic", (tokens @ tokens.mT / len(h)).softmax(-1), tokens)


NETS = {
    "PReLU": Block(nn.PReLU(4)),
    "GLU": Block(nn.GLU(1)),
    "Softmax2d": Block(nn.Softmax2d()),
    "ReflectionPad2d": Block(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "ChannelShuffle": Block(nn.ChannelShuffle(2)),
    "RMSNorm": Block(nn.Sequential(nn.Flatten(), nn.RMSNorm(120))),
    "linear layer on the last axis": Block(nn.Sequential(nn.Flatten(2), nn.Linear(30, 3), nn.LayerNorm(3))),
    "parameter per channel": Scaled(),
    "attention": Block(attention),
    "rows": Block(lambda h: h.reshape(len(h), -1) if len(h.shape) == 4 else h),
    "chunks": Block(lambda h: torch.mul(*h.chunk(2, 1))),
    "slice assignment": Block(overwrite_slice),
    "view in place": Block(overwrite_rows),
    "alias in place": Block(overwrite_alias),
    "relu in place, read again": Block(reads_again(lambda h: F.relu(h, inplace=True))),
    "silu in place, read again": Block(reads_again(nn.SiLU(inplace=True))),
    "relu6 in place, read again": Block(reads_again(nn.ReLU6(inplace=True))),
    "hardswish method in place, read again": Block(reads_again(lambda h: F.hardtanh_(h))),
    "mul_ read again": Block(reads_again(lambda h: h.mul_(2))),
    "+= read again": Block(reads_again(lambda h: h.__iadd__(1))),
    "flat view in place": Block(reads_again(lambda h: h.flatten(2).add_(1).view(h.shape))),
    "dropout in place, read again": Block(reads_again(nn.Dropout(0.4, inplace=True))),
    "dropout function in place, read again": Block(reads_again(lambda h: F.dropout2d(h, 0.4, inplace=True))),
    "no_grad": Block(without_gradient),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_vectorized_program_matches_separate_models(name, training):
    torch.manual_seed(0)
    net = NETS[name].double().train(training)
    program = vectorize(net, torch.randn(4, 2, 7, 6, dtype=torch.float64))
    assert program.norm_paths == ["norm"]
    assert_program_matches(program, net, (2, 7, 6))


@pytest.mark.parametrize("name", NETS)
def test_checked_program_uses_vmap_where_a_trace_is_wrong_or_impossible(name):
    net = nn.Sequential(NETS[name].float().train(), nn.Flatten())
    assert isinstance(checked_program(net, torch.randn(20, 2, 7, 6), trains=True), VectorizedProgram)


def test_vectorized_program_of_integer_inputs():
    net = Tokens().double()
    program = checked_program(net, torch.randint(7, (9, 5)), trains=True)
    assert_program_matches(program, net, (5,), integers=7)


def test_checked_program_rejects_a_wrong_batching_rule():
    """The gradient of a padding token, which must be zero, is not zero under ``torch.vmap``."""
    with pytest.raises(Unstackable, match="differs from the model"):
        checked_program(Tokens(padding_idx=0), torch.randint(7, (9, 5)), trains=True)


def test_vectorized_program_does_not_change_its_input():
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.PReLU()), torch.randn(4, 6)
    before = x.clone()
    vectorize(net, x).bind({n: v[None] for n, v in net.state_dict().items()}, 1)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (nn.Sequential(nn.Flatten(2), nn.LSTM(42, 3)), "aten::lstm"),
        (Block(lambda h: h * torch.rand_like(h)), "random operation"),
        (Block(lambda h: F.alpha_dropout(h, 0.5, True)), "random operation"),
        (Block(lambda h: h * float(h.sum())), "item"),
        (Block(lambda h: (h, h)), "one tensor to one tensor"),
    ],
)
def test_vectorize_rejects(net, reason):
    with pytest.raises(Unstackable, match=reason):
        vectorize(net, torch.randn(4, 2, 7, 6))


def test_networks_need_vmap():
    assert not {nn.PReLU, nn.Embedding, nn.LSTM}.intersection(STACKED_LAYERS)
