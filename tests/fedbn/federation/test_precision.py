"""Training in bfloat16: states, messages and sums stay float32, and results stay close to float32."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.run import Run
from fedbn.federation.training import autocast_forward
from fedbn.strategies.base import strategies
from fedbn_simulations.engines.execute import execute
from tests.helpers import assert_engines_agree, same, sampling_options

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", strategies())
def test_bfloat16_training_keeps_float32_state(name, small):
    outcome = execute(small(name, rounds=1, precision="bfloat16", **sampling_options(name)), "reference")
    states = [outcome.server.state, *outcome.client_states.values()]
    assert {v.dtype for s in states for v in s.values() if v.is_floating_point()} == {torch.float32}
    assert all(torch.isfinite(v).all() for s in states for v in s.values())


def test_bfloat16_engines_agree_and_differ_from_float32(small):
    reference = assert_engines_agree(small("fedbn", precision="bfloat16"))
    assert not same(reference.server.state, execute(small("fedbn"), "reference").server.state)


@pytest.mark.parametrize("model", ["mlp", "small-cnn"])
def test_bfloat16_stacked_is_as_close_to_float32(model, small):
    def weights(precision, engine):
        state = execute(small("global-naive", rounds=1, model=model, precision=precision), engine).server.state
        return torch.cat([v.flatten().double() for v in state.values()])

    exact = weights("float32", "reference")
    single, stacked = (weights("bfloat16", e) for e in ("reference", "grid:stacked"))
    assert 0 < (single - exact).norm() < 0.05 * exact.norm()
    assert 0 < (stacked - exact).norm() < 3 * (single - exact).norm()


def test_autocast_forward_sums_statistics_in_float32():
    layer, recorded = nn.BatchNorm1d(4), []
    layer.register_forward_pre_hook(lambda m, inputs: recorded.append(inputs[0]))
    net = nn.Sequential(nn.Linear(3, 4), layer)
    autocast_forward(net, torch.randn(4096, 3) + 10, "bfloat16")
    (x,) = recorded
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, 0.1 * x.float().mean(0), rtol=1e-5, atol=1e-5)
    assert layer.running_var.dtype == torch.float32


def test_run_rejects_unknown_precision():
    values = json.loads(Run("digits8", "fedbn", plan=Plan()).to_json())
    with pytest.raises(UserError, match="float32"):
        Run.from_dict(values | {"plan": {"precision": "float8"}})
