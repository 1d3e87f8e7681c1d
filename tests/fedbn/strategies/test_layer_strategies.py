"""Federated runs of the strategies that only replace the normalization layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role, norm_layers
from fedbn.strategies.base import Progress, strategy
from tests.helpers import federated, mostly_slow


@pytest.fixture
def naive_state(small):
    return finished(small, "global-naive")[1].server.state


def finished(small, name, rounds=1):
    return federated(small(name, rounds=rounds, eval_every=rounds))


@pytest.mark.parametrize(
    "name",
    mostly_slow(["evalnorm", "evalnorm:rule=learned", "dbn", "iabn:k=inf", "ghost-bn:size=1000"], "dbn", "evalnorm"),
)
def test_training_equals_global_bn_exactly(name, small, naive_state):
    ctx, out = finished(small, name)
    for key, value in naive_state.items():
        if ctx.ownership.roles[key] is not Role.STATISTICS or name.startswith(("evalnorm", "iabn")):
            assert torch.equal(out.server.state[key], value), key
        elif name.startswith("ghost"):
            torch.testing.assert_close(out.server.state[key], value, rtol=1e-5, atol=1e-6)


def test_groupnorm_has_eight_groups_by_default():
    layers = norm_layers(strategy("groupnorm").prepare_model(nn.Sequential(nn.BatchNorm2d(72), nn.BatchNorm1d(20))))
    assert [layer.num_groups for layer in layers.values()] == [8, 5]


def test_batch_renorm_with_closed_limits_is_global_bn(small, naive_state):
    ctx, closed = finished(small, "batch-renorm:r_max=1:d_max=0")
    _, unlimited = finished(small, "batch-renorm:start=0:r_full=0:d_full=0")
    key = "features.0.weight"
    moved = (naive_state[key] - ctx.initial[key]).norm()
    distances = [float((out.server.state[key] - naive_state[key]).norm() / moved) for out in (closed, unlimited)]
    assert distances[0] < 0.02 < 0.1 < distances[1]  # rounding flips a few maxima of max pooling


def test_evalnorm_aggregates_batch_size(small):
    ctx, out = finished(small, "evalnorm")
    largest = ctx.run.plan.batch_size + 1  # a single last row joins the previous batch
    assert 1 < float(out.server.state["features.1.running_size"]) <= largest


def test_dbn_epoch_counts_rounds(small):
    _, out = finished(small, "dbn:alpha=1/m:step=epoch", rounds=2)
    assert float(out.server.state["features.1.steps"]) == 2


def test_fedwon_smaller_clip_moves_weights_less(small):
    ctx, tight = finished(small, "fedwon:clip=0.001")
    _, loose = finished(small, "fedwon:clip=1000")
    key = "features.0.parametrizations.weight.original"
    start = ctx.initial[key]
    moved = [float((out.server.state[key] - start).norm()) for out in (tight, loose)]
    assert moved[0] < moved[1] / 2


def test_weight_standardization_groupnorm_is_optional(small):
    assert [m.num_groups for m in norm_layers(build_context(small("weight-standardization:groups=4")).scratch).values()]
    assert not norm_layers(build_context(small("weight-standardization:groups=0")).scratch)


def test_full_norm_shares_statistic_gradients(small):
    ctx, out = finished(small, "full-norm:a=0.3")
    assert ctx.ownership.roles["features.1.running_grad_mean"] is Role.STATISTICS
    assert float(out.server.state["features.1.running_grad_second"].abs().sum()) > 0
    assert all(torch.isfinite(v).all() for v in out.server.state.values())


def test_dbn_begins_rounds_in_training_mode(small):
    ctx = build_context(small("dbn:step=epoch"))
    model = ctx.load(ctx.initial).eval()
    ctx.strategy.set_training_mode(model, Progress(1, 2))
    assert model.training
