"""Online rules in the ClientApp: the online column with a rule is equal in every engine."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.client import user_state
from fedbn.federation.cold_start import population_prior_for, summarize
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.online import follow_rule, personalize, rule
from fedbn.online.prequential import follow
from fedbn.streams import Stream
from fedbn_clients.config import run_from_config
from fedbn_simulations.cli.app import app
from fedbn_simulations.engines.execute import execute
from tests.helpers import assert_engines_agree, federated

pytestmark = pytest.mark.slow

POPULATION_RULE = "population:diversity=1"


@pytest.fixture
def small(tmp_path):
    """A function that returns a short run on four users with 40 rows each, shifted and scaled per user."""
    draw = np.random.default_rng(0)
    y, user = np.tile(np.arange(160) // 5 % 2, 1), np.arange(160) // 40
    x = draw.normal(size=(160, 6)) * (1 + user[:, None] / 2) + user[:, None] + 2 * y[:, None] * (np.arange(6) < 3)
    np.savez(tmp_path / "own.npz", x=x, y=y, user=user)

    def make(strategy):
        plan = Plan(rounds=2, eval_every=2, batch_size=8, global_test=12)
        return Run(f"files:path={tmp_path / 'own.npz'}:test=0.5", strategy, model="mlp", plan=plan).resolved()

    return make


@pytest.mark.parametrize("strategy", ["global-naive", "fedbn-seeded", "fedbn"])
@pytest.mark.parametrize("text", ["ema:rate=0.3", POPULATION_RULE])
def test_online_rule_engines_agree(strategy, text, small):
    run = replace(small(strategy), rule=text)
    if strategy == "fedbn" and text == POPULATION_RULE:
        with pytest.raises(UserError, match=f"with strategy '{strategy}' no client sends any"):
            build_context(run)
        return
    scores = assert_engines_agree(run).scores
    plain = execute(replace(run, rule=""), "reference").scores
    assert [s.metrics["loss"] for c in scores.values() for s in c] != [
        s.metrics["loss"] for c in plain.values() for s in c
    ]


@pytest.mark.parametrize("text", ["ema:rate=0.3", POPULATION_RULE])
def test_online_column_equals_prequential_evaluation(text, small):
    ctx, out = federated(replace(small("global-naive"), rule=text))
    for user in (ctx.population.unseen[0], ctx.population.seen[1]):
        data = ctx.population.users[user]
        state = user_state(ctx, user, out.server.serving, out.client_states.get(user))
        prior = None
        if text == POPULATION_RULE:
            prior = population_prior_for(ctx, state, summarize(ctx, out.server.client_statistics), data.train.x)
        net = personalize(copy.deepcopy(ctx.load(state)), rule(text), prior)
        (trace,) = follow(net, [Stream(data.name, data.test.x, data.test.y, data.test.recording)])
        accuracies = [s.metrics["accuracy"] for s in out.scores[user] if s.column == "online" and s.row != "global"]
        assert accuracies == [pytest.approx(trace.values.mean(), abs=1e-12)]


def test_population_prior_for_weights_by_client_variance(small):
    ctx, out = federated(replace(small("global-naive"), rule=POPULATION_RULE))
    x = ctx.population.users[ctx.population.unseen[0]].train.x
    clients = out.server.client_statistics
    equal = dict.fromkeys(clients, next(iter(clients.values())))
    prior, strongest = (population_prior_for(ctx, out.server.serving, summarize(ctx, s), x) for s in (clients, equal))
    for path, layer in prior.items():
        means = torch.stack([c[f"{path}.running_mean"] for c in clients.values()])
        torch.testing.assert_close(layer.mean, means.mean(0))
        assert (layer.n0 <= strongest[path].n0).all()
        assert layer.n0.median() < strongest[path].n0[0] / 10
        assert (strongest[path].n0 == strongest[path].n0[0]).all(), "maximal for equal clients"


def test_follow_rule_returns_state_and_keeps_model(small):
    ctx = build_context(small("global-naive"))
    model, data = ctx.load(ctx.initial).eval(), ctx.population.users[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits, net = follow_rule(model, data.test.x, rule("cumulative"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert logits.shape == (len(data.test), len(ctx.population.classes))
    assert net.state("this").n == len(data.test)


def test_run_rejects_rules_that_need_labels():
    for text in ("class-mixture", "ttn"):
        with pytest.raises(UserError, match="needs labeled windows of seen users"):
            run_from_config({"scenario": "digits8", "strategy": "fedbn", "rule": text})
    with pytest.raises(UserError, match="unknown rule 'emma'. Did you mean 'ema'"):
        run_from_config({"scenario": "digits8", "strategy": "fedbn", "rule": "emma"})
    run = run_from_config({"scenario": "digits8", "strategy": "global-naive", "rule": "pseudo:n0=16.0"})
    assert run.rule == "pseudo"


@pytest.mark.slow
def test_compare_command_accepts_rule(tmp_path):
    out = str(tmp_path / "out")
    arguments = ["compare", "hapt:unseen=2:reserved=24", "--strategies", "global-naive"]
    arguments += ["--rule", "pseudo:n0=16:diversity=1", "--rounds", "1", "--seeds", "1", "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", out])
    assert result.exit_code == 0, result.output
    assert "adapted online" in result.output
