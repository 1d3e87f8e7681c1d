from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.auditing.audit import audit
from fedbn.config import Plan
from fedbn.federation.loop import federate
from fedbn.federation.mismatch import measure_mismatch, mismatch_notices
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.nn.roles import statistics_layers
from fedbn.statistics.mismatch import outputs_in_both_modes


def finished(strategy):
    run = Run("digits8:users=3:unseen=1", strategy, plan=Plan(rounds=1, eval_every=1)).resolved()
    ctx = build_context(run)
    return ctx, federate(run, ctx=ctx)


@pytest.fixture(scope="module")
def outcome():
    return finished("fedavg")


def test_wrong_served_statistics_are_measured_and_noticed(outcome):
    ctx, out = outcome
    good = measure_mismatch(ctx, out)
    spoiled = {k: v + 50 if k.endswith("running_mean") else v for k, v in out.server.serving.items()}
    bad = measure_mismatch(ctx, replace(out, server=replace(out.server, serving=spoiled)))
    assert bad["batch"] == pytest.approx(good["batch"])
    assert bad["served"] < good["served"] - 0.2
    assert "training data is more than 0.03 worse with the running statistics" in mismatch_notices(ctx, bad)[0]
    assert mismatch_notices(ctx, bad | {"served": bad["batch"]}) == []
    assert good["clients"] == len(ctx.population.seen)


def test_measuring_changes_neither_outcome_nor_random_numbers(outcome):
    ctx, out = outcome
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = measure_mismatch(ctx, out)
    assert torch.equal(torch.rand(1), expected)
    assert measure_mismatch(ctx, out) == first


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "measured"), [("silobn", True), ("fixbn", True), ("groupnorm", False)])
def test_strategies_are_measured_in_their_own_modes(strategy, measured):
    ctx, out = finished(strategy)
    found = measure_mismatch(ctx, out)
    assert (found is not None) == measured
    if strategy == "fixbn":  # trains with frozen statistics in the end
        assert found["batch"] == found["served"]
    assert mismatch_notices(ctx, None) == []


@pytest.mark.slow
def test_local_statistics_that_are_elsewhere_are_not_measured():
    ctx, out = finished("silobn")
    assert measure_mismatch(ctx, replace(out, client_states={})) is None


def test_outputs_in_both_modes_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(9, 3)
    batch, served = outputs_in_both_modes(model, x, 4)  # 4 and 5 examples
    assert torch.equal(served, model(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    layer = next(iter(statistics_layers(model).values()))
    hidden = model[0](x[:4])
    normed = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + layer.eps).sqrt()
    assert torch.allclose(batch[:4], model[3](normed), atol=1e-5)


def test_audit_warns_about_running_statistics_that_do_not_fit():
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), torch.arange(2).repeat(32)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0, 0], [1, 0]]))
        model[1].bias.zero_()
    x = torch.stack([2.0 * y + 100, torch.randn(64)], 1)
    findings = {f.lint: f for f in audit(model, data=(x, y)).findings}
    assert "1.000 with batch statistics and 0.500 with running ones" in findings["mismatch"].message
    model[0].running_mean.copy_(x.mean(0))
    assert "mismatch" not in {f.lint for f in audit(model, data=(x, y)).findings}
