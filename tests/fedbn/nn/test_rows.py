"""Models that mix the rows of a batch are found by computation, and the layer is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.nn.conversion import convert
from fedbn.nn.rows import mixing_layer


def around(*layers):
    """A network with layers in the middle, with trained statistics, in evaluation mode."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)
    net = nn.Sequential(nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), *layers, *head)
    net(torch.randn(16, 6, 20))
    return net.eval()


class Function(nn.Module):
    """Layer ``[N, C, L]`` of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class AlwaysTraining(nn.BatchNorm1d):
    """BN that stays in training mode."""

    def train(self, mode=True):
        return super().train(True)


class BatchAttention(nn.Module):
    """Attention over the rows of a batch."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        rows = x.mean(2)[None]
        return x + self.attention(rows, rows, rows)[0][0, :, :, None]


class TimeFirst(nn.Module):
    """Recurrent layer that takes axis 0, here the batch, for time."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8)

    def forward(self, x):
        return self.rnn(x.transpose(1, 2))[0].transpose(1, 2)


MIXING = {
    "untracked BN": nn.BatchNorm1d(8, track_running_stats=False),
    "BN in training mode": AlwaysTraining(8),
    "functional BN": Function(lambda x: F.batch_norm(x, None, None, training=True)),
    "centered by the batch": Function(lambda x: x - x.mean(0)),
    "scaled by the batch": Function(lambda x: x / x.abs().max()),
    "difference from the next row": Function(lambda x: x - x.roll(1, 0)),
    "attention over rows": BatchAttention(),
    "recurrent over rows": TimeFirst(),
    "difference from the row before": Function(lambda x: x - F.pad(x, (0, 0, 0, 0, 1, 0))[:-1]),
}
SEPARATE = {
    "BN": nn.BatchNorm1d(8),
    "instance": nn.InstanceNorm1d(8),
    "tracked instance": nn.InstanceNorm1d(8, track_running_stats=True),
    "group": nn.GroupNorm(2, 8),
    "softmax": nn.Softmax(1),
    "dropout": nn.Dropout(),
    "sign": Function(torch.sign),
    "attention over time": Function(lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2)),
    "random": Function(lambda x: F.dropout(x)),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_layer_is_found_and_named(name, rows):
    layer = copy.deepcopy(MIXING[name])
    net = around(layer)
    assert mixing_layer(net, torch.randn(rows, 6, 20)) == f"layer '2' ({type(layer).__name__})"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SEPARATE)
def test_separate_rows_are_accepted(name, rows):
    net = around(copy.deepcopy(SEPARATE[name]))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert mixing_layer(net, torch.randn(rows, 6, 20)) is None
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "kind", ["ghost-bn", "full-norm", "batch-renorm", "iabn", "evalnorm", "dbn", "instance", "iew"]
)
def test_rows_are_separate_in_evaluation_for_every_layer(kind):
    assert mixing_layer(convert(around(), kind).eval(), torch.randn(2, 6, 20)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_of_the_model_does_not_matter(dtype):
    x = torch.randn(3, 6, 20, dtype=dtype)
    assert mixing_layer(around(nn.GELU()).to(dtype), x) is None
    assert mixing_layer(around(nn.BatchNorm1d(8, track_running_stats=False)).to(dtype), x) is not None


def test_forward_pass_is_named_without_a_layer():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(x - x.mean(0))

    assert mixing_layer(Own(), torch.randn(2, 6)) == "its forward pass"


def test_untracked_layer_that_rejects_one_row_is_named():
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    assert mixing_layer(net, torch.randn(1, 6)) == "layer '1' (BatchNorm1d)"


def test_model_that_accepts_only_some_values_is_judged_by_them():
    class Codes(nn.Module):
        def __init__(self, mix):
            super().__init__()
            self.table, self.mix = nn.Embedding(5, 4), mix

        def forward(self, x):
            out = self.table(x.long()).mean(1)
            return out - out.mean(0) if self.mix else out

    x = torch.tensor([[0.0, 1.0, 2.0], [4.0, 4.0, 3.0]])
    assert mixing_layer(Codes(mix=False), x) is None
    assert mixing_layer(Codes(mix=True), x) == "its forward pass"
