"""Whole runs of the reference loop, compared with a second implementation in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedbn.config import Plan
from fedbn.data.population import Examples, Population, User
from fedbn.federation.client import OPTIMIZER
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context_for
from fedbn.nn.roles import with_prefix
from tests import oracles
from tests.oracles import COUNTER, MEAN, SCALE, SHIFT, VARIANCE

NORM = {SCALE, SHIFT, MEAN, VARIANCE, COUNTER}
LOCAL = {
    "global-naive": {COUNTER},
    "global-pooled": {COUNTER},
    "global-recalibrated": {COUNTER},
    "fedbn": NORM,
    "silobn": {MEAN, VARIANCE, COUNTER},
    "params-only": {MEAN, VARIANCE, COUNTER},
}
"""Entries that stay at the client."""

PLAN = Plan(rounds=2, batch_size=8, lr=0.1, global_test=1000, eval_every=1)
PLANS = {
    "proximal": replace(PLAN, local_epochs=2, schedule="cosine", proximal=0.5, weight_decay=0.01),
    "sampled": replace(PLAN, rounds=3, clients_per_round=2, optimizer_state="keep", weighting="uniform", momentum=0.5),
}


@pytest.fixture
def population(monkeypatch):
    """Three clients of 17, 24 and 41 rows and an unseen user, who differ in scale, center and labels; float64."""
    torch.set_default_dtype(torch.float64)
    draw = torch.Generator().manual_seed(0)

    def examples(i, n):
        y = torch.multinomial(torch.tensor([1.0, 1 + i, 3 - i / 2]), n, True, generator=draw)
        x = torch.randn(n, 5, generator=draw) * (1 + i / 2) + i + y[:, None]
        return Examples(x, y, torch.zeros(n).long())

    sizes = ((17, 7), (24, 9), (41, 19), (13, 20))
    users = [User(f"u{i}", "d", *(examples(i, n) for n in pair)) for i, pair in enumerate(sizes)]
    yield Population(tuple(users), (3,), ("a", "b", "c"), "none")
    torch.set_default_dtype(torch.float32)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LOCAL)
def test_run_matches_plain_pytorch(name, plan, population):
    plan, seed, local = PLANS[plan], 3, LOCAL[name]
    ctx = build_context_for(Run("digits8", name, seed=seed, model="mlp", plan=plan).resolved(), population)
    out = federate(ctx.run, ctx=ctx)
    clients = [(u.train.x, u.train.y) for u in population.users[:3]]
    server, own, momentum, sent, losses = oracles.federate(
        clients, ctx.initial, plan, seed, local, is_pooled=name == "global-pooled"
    )

    assert [p.train_loss for p in out.curve] == pytest.approx(losses, rel=1e-12)
    close(out.server.state, server)
    assert out.client_states.keys() == own.keys()
    for i, state in out.client_states.items():
        close({k: v for k, v in state.items() if not k.startswith(OPTIMIZER)}, own[i])
        close(with_prefix(state, f"{OPTIMIZER}momentum_buffer/"), momentum[i] if plan.optimizer_state == "keep" else {})

    if name == "global-recalibrated":
        server |= zip((MEAN, VARIANCE), oracles.recalibrated(server, torch.cat([x for x, _ in clients])), strict=True)
    tests = [(u.test.x, u.test.y) for u in population.users]
    pooled = tuple(torch.cat(parts) for parts in zip(*tests[:3], strict=True))
    for i, (x, y) in enumerate(tests):
        row = "own" if i < 3 else "unseen"
        state = ctx.initial | server | own.get(i, {})
        measured = oracles.recalibrated(state, population.users[i].train.x)
        expected = {
            (row, "aggregated"): oracles.scores(oracles.forward(state, x), y),
            (row, "recalibrated"): oracles.scores(oracles.forward(state, x, measured), y),
            (row, "online"): oracles.scores(oracles.online(state, x, plan.online_prior), y),
        }
        if i < 3:
            if len(local) > 1 or i == 0:  # otherwise all users share one model
                expected["global", "aggregated"] = oracles.scores(oracles.forward(state, pooled[0]), pooled[1])
            expected["global", "recalibrated"] = oracles.scores(oracles.forward(state, pooled[0], measured), pooled[1])
        elif MEAN in server:
            starts = oracles.cold_starts(state, [sent[k] for k in sorted(sent)], population.users[i].train.x)
            starts["initial"] = ctx.initial[MEAN], ctx.initial[VARIANCE]
            expected |= {(row, k): oracles.scores(oracles.forward(state, x, s), y) for k, s in starts.items()}
        actual = {
            (s.row, s.column): tuple(s.metrics[name] for name in ("accuracy", "macro_f1", "loss"))
            for s in out.scores[i]
        }
        actual.pop(("global", "online"), None)
        assert actual.keys() == expected.keys()
        for cell, values in expected.items():
            assert actual[cell] == pytest.approx(values, rel=1e-9), cell
