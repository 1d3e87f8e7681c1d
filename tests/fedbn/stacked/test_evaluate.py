"""Many users are scored at once as each would be alone."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clients.jobs import Evaluate
from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.federation.client import cells, client_evaluation, client_round
from fedbn.federation.metrics import COLUMNS, score, scores
from fedbn.federation.server import Server, global_columns, served_users
from fedbn.federation.setup import build_context
from fedbn.models import models
from fedbn.stacked.cohort import Failure
from fedbn.stacked.executors import ClientExecutor
from fedbn.strategies.base import Progress, strategies
from fedbn.strategies.silobn import SiloBN
from tests.fedbn.stacked.test_executors import STACKED, context_or_skip, in_double, of_model, ragged

LARGE = {name for name in models() if name.endswith("-cvgj")}


def with_tests(ctx, sizes=(1, 30, 9, 17, 16, 8)):
    """The setting with as many test rows a user, in another order than their training rows."""
    users = []
    for i, user in enumerate(ctx.population.users):
        pool, n = user.train, sizes[i % len(sizes)]
        rows = torch.arange(n) % len(pool)
        test = Examples(pool.x[rows] * 1.5 + 0.1 * i, pool.y[rows], pool.recording[rows])
        users.append(User(user.name, user.domain, user.train, test))
    return replace(ctx, population=replace(ctx.population, users=tuple(users)))


def trained(ctx):
    """The server and what clients keep after a round."""
    server, kept, updates = Server(ctx.start(), ctx.start()), {}, []
    for user in ctx.trainers:
        update, kept[user] = client_round(
            ctx, user, server.sends(ctx, user), None, Progress(1, 1), (), server.broadcast
        )
        updates.append(update)
    server.advance(ctx, updates, 1)
    return server, kept


def jobs_of(ctx, server, kept, columns=COLUMNS):
    client_statistics = server.client_statistics or None
    return [
        Evaluate(
            ctx, u, server.sends(ctx, u, serving=True), kept.get(u), columns, global_columns(ctx, u), client_statistics
        )
        for u in served_users(ctx)
    ]


def alone(jobs):
    return [
        client_evaluation(
            j.ctx,
            j.user,
            j.received,
            j.client_state,
            columns=j.columns,
            globally=j.globally,
            client_statistics=j.client_statistics,
        )
        for j in jobs
    ]


def agree(together, apart):
    assert not any(isinstance(t, Failure) for t in together), together
    assert len(together) == len(apart)
    for found, expected in zip(together, apart, strict=True):
        assert [(s.row, s.column, s.n) for s in found] == [(s.row, s.column, s.n) for s in expected]
        for a, b in zip(found, expected, strict=True):
            assert a.accuracy == pytest.approx(b.accuracy, abs=1e-12)
            assert a.macro_f1 == pytest.approx(b.macro_f1, abs=1e-12)
            assert a.loss == pytest.approx(b.loss, rel=1e-9)


def told(caplog):
    return [r.message for r in caplog.records]


@pytest.mark.parametrize("model", ["mlp", "small-cnn"])
@pytest.mark.parametrize("name", strategies())
def test_every_strategy_is_scored_as_users_are_one_by_one(name, model, caplog):
    if strategies()[name].syncs_first_batch:
        pytest.skip("talks before training")
    ctx = with_tests(in_double(context_or_skip(ragged(name, model))))
    jobs = jobs_of(ctx, *trained(ctx))
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        found = ClientExecutor("stacked", 1).run(jobs)
    assert not told(caplog) or name not in STACKED
    agree(found, alone(jobs))


@pytest.mark.parametrize("name", [*sorted(models().keys() - LARGE), "tests.fedbn.stacked.test_executors:network"])
def test_every_model_is_scored_as_users_are_one_by_one(name):
    ctx = with_tests(of_model(build_context(ragged(batch_size=8)), name))
    jobs = jobs_of(ctx, *trained(ctx))
    for executors in (ClientExecutor("stacked", 2), ClientExecutor("lean", 1)):
        agree(executors.run(jobs), alone(jobs))


def test_streams_end_one_after_the_other_in_stacks_of_any_width(monkeypatch):
    ctx = with_tests(in_double(build_context(ragged("silobn"))), sizes=(3, 24, 25, 1, 40))
    jobs = jobs_of(ctx, *trained(ctx))
    expected = alone(jobs)
    for wide in (1, 2, 3, 7):
        monkeypatch.setattr("fedbn.stacked.executors.width", lambda *_, wide=wide, **__: wide)
        agree(ClientExecutor("stacked", 1).run(jobs), expected)


def test_a_prior_of_nothing_and_one_that_never_moves():
    for prior in (0.0, float("inf")):
        ctx = with_tests(in_double(build_context(ragged("fedbn", online_prior=prior))), sizes=(16, 8))
        jobs = jobs_of(ctx, *trained(ctx), ("online",))
        agree(ClientExecutor("stacked", 1).run(jobs), alone(jobs))


def test_on_threads_the_same_bits(monkeypatch):
    monkeypatch.setattr("fedbn.stacked.executors.WORTH_A_THREAD", 0.0)
    monkeypatch.setattr("fedbn.stacked.executors.width", lambda *_, **__: 2)
    ctx = with_tests(build_context(ragged("fedbn", "small-cnn")))
    jobs = jobs_of(ctx, *trained(ctx))
    assert ClientExecutor("stacked", 2).run(jobs) == ClientExecutor("stacked", 1).run(jobs)


@pytest.mark.parametrize("rows", [1, 10, 40])
def test_what_is_too_much_at_once_is_computed_in_parts(rows, monkeypatch):
    ctx = with_tests(in_double(build_context(ragged("fedbn", "small-cnn"))))
    jobs = jobs_of(ctx, *trained(ctx))
    expected = alone(jobs)
    monkeypatch.setattr("fedbn.stacked.evaluate.AT_ONCE", len(jobs) * rows * 64 * 8)
    agree(ClientExecutor("stacked", 1).run(jobs), expected)


def test_a_rule_is_followed_one_by_one_and_newcomers_start_from_others():
    run = replace(ragged("fedbn-seeded"), partition="", rule="dabn").resolved()
    ctx = in_double(build_context(run))
    jobs = jobs_of(ctx, *trained(ctx))
    expected = alone(jobs)
    agree(ClientExecutor("stacked", 1).run(jobs), expected)
    assert {s.column for found in expected for s in found} > set(COLUMNS)  # the starts of newcomers


class OtherOrder(nn.Module):
    """Its layers are computed in another order than they are registered in."""

    def __init__(self, shape, classes):
        super().__init__()
        self.last = nn.BatchNorm1d(6)
        self.first = nn.BatchNorm1d(8)
        self.into, self.through, self.out = nn.Linear(64, 8), nn.Linear(8, 6), nn.Linear(6, classes)

    def forward(self, x):
        return self.out(self.last(self.through(self.first(self.into(x.flatten(1))).relu())))


class TwoKinds(nn.Sequential):
    """One of its layers has statistics of its own, but is no batch normalization."""

    def __init__(self, shape, classes):
        kinds = nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU(), nn.BatchNorm2d(3)
        super().__init__(nn.Conv2d(1, 3, 3), *kinds, nn.Flatten(), nn.Linear(108, classes))


@pytest.mark.parametrize("model", ["OtherOrder", "TwoKinds"])
def test_statistics_that_are_not_measured_in_one_pass_are_measured_one_by_one(model, monkeypatch):
    ctx = with_tests(of_model(build_context(ragged(batch_size=8)), f"tests.fedbn.stacked.test_evaluate:{model}"))
    jobs = jobs_of(ctx, *trained(ctx))
    expected = alone(jobs)
    asked = []
    monkeypatch.setattr("fedbn.stacked.executors.cells", lambda *args: asked.append(args[3]) or cells(*args))
    agree(ClientExecutor("stacked", 1).run(jobs), expected)
    assert set(asked) == {("recalibrated",), ("online",)}


def test_a_strategy_that_follows_in_its_own_way_does(monkeypatch):
    monkeypatch.setattr(SiloBN, "predict_stream", lambda self, model, x: -model.eval()(x).detach())
    ctx = with_tests(in_double(build_context(ragged("silobn"))))
    jobs = jobs_of(ctx, *trained(ctx))
    agree(ClientExecutor("stacked", 1).run(jobs), alone(jobs))


def test_whose_model_lacks_entries_fails_alone():
    ctx = with_tests(in_double(build_context(ragged())))
    jobs = jobs_of(ctx, *trained(ctx))
    jobs[1] = replace(jobs[1], received={})
    found = ClientExecutor("stacked", 1).run(jobs)
    assert isinstance(found[1], Failure)
    assert "missing" in str(found[1].error)
    agree([found[0], *found[2:]], alone([jobs[0], *jobs[2:]]))


def test_a_rule_that_fails_for_one_user_fails_alone(monkeypatch):
    run = replace(ragged("silobn"), rule="pseudo").resolved()
    ctx = with_tests(in_double(build_context(run)))
    jobs = jobs_of(ctx, *trained(ctx))

    def failing(ctx, user, *args):
        if user == jobs[2].user:
            raise UserError("too short")
        return cells(ctx, user, *args)

    monkeypatch.setattr("fedbn.stacked.executors.cells", failing)
    found = ClientExecutor("stacked", 1).run(jobs)
    assert str(found[2].error) == "too short"
    assert [len(f) for i, f in enumerate(found) if i != 2] == [len(f) for i, f in enumerate(alone(jobs)) if i != 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda jobs: [replace(jobs[0], columns=("aggregated",)), *jobs[1:]], "users are asked for different columns"),
        (lambda jobs: jobs, "examples of a batch are normalized together in evaluation too"),
    ],
)
def test_what_is_scored_user_by_user_is_said_once(change, reason, caplog):
    ctx = with_tests(in_double(build_context(ragged())), sizes=(9, 30))
    if "batch" in reason:
        ctx = of_model(ctx, "tests.fedbn.stacked.test_evaluate:batchwise")
    jobs = change(jobs_of(ctx, *trained(ctx), COLUMNS if "columns" in reason else ("aggregated",)))
    executors = ClientExecutor("stacked", 1)
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        for _ in range(2):
            agree(executors.run(jobs), alone(jobs))
    assert told(caplog) == [f"evaluating user by user: {reason}"]


def batchwise(shape, classes):
    """Normalized by its batch in evaluation too."""
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 8), norm, nn.Linear(8, classes))


def test_who_is_served_a_model_of_its_own_is_scored_alone(caplog):
    ctx = with_tests(in_double(build_context(ragged("fedbn+finetune", proximal=0.0))))
    jobs = jobs_of(ctx, *trained(ctx))
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        agree(ClientExecutor("stacked", 1).run(jobs), alone(jobs))
    assert told(caplog) == ["evaluating user by user: finetune serves models of its own"]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_scores_of_many_are_the_scores_of_each(k, width, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(k, width, classes, generator=draw)
    y = torch.randint(0, classes, (k, width), generator=draw)
    n = torch.randint(1, width + 1, (k,), generator=draw).tolist()
    expected = [score("own", "online", outputs[i, : n[i]], y[i, : n[i]]) for i in range(k)]
    agree([scores(["own"] * k, "online", outputs, y, n)], [expected])
