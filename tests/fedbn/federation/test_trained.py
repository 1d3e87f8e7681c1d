"""Trained models predict what the evaluation has scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.federation.trained import trained_model
from tests.helpers import federated


@pytest.mark.parametrize("strategy", ["fedbn", "local", "centralized", "fedbn+ditto"])
def test_trained_model_of_a_user_has_the_evaluated_scores(small, strategy):
    ctx, outcome = federated(small(strategy, rounds=2))
    for index, scores in outcome.scores.items():
        user = ctx.population.users[index]
        (expected,) = [s for s in scores if s.row in ("own", "unseen") and s.column == "aggregated"]
        model = trained_model(ctx, outcome, user.name)
        assert not model.training
        with torch.no_grad():
            predicted = model(user.test.x).argmax(1)
        assert (predicted == user.test.y).double().mean().item() == pytest.approx(expected.metrics["accuracy"])


def test_trained_model_is_a_copy(small):
    ctx, outcome = federated(small("fedbn", rounds=1))
    seen = ctx.population.users[ctx.population.seen[0]].name
    first, own = trained_model(ctx, outcome), trained_model(ctx, outcome, seen)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    nn.init.zeros_(next(own.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())
    again = trained_model(ctx, outcome, seen)
    assert next(again.parameters()).any()


def test_trained_model_rejects_what_does_not_exist(small):
    ctx, outcome = federated(small("local", rounds=1))
    with pytest.raises(UserError, match="strategy 'local' shares no model: name a user"):
        trained_model(ctx, outcome)
    with pytest.raises(UserError, match="unknown user 'nobody'"):
        trained_model(ctx, outcome, "nobody")
    seen = ctx.population.users[ctx.population.seen[0]].name
    with pytest.raises(UserError, match=f"the entries that user '{seen}' keeps under 'local' are unknown"):
        trained_model(ctx, replace(outcome, client_states={}), seen)
