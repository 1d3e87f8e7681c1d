"""Stacked evaluation equals the evaluation of each user by itself."""

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
from fedbn.federation.client import client_evaluation, client_round, user_scores
from fedbn.federation.metrics import COLUMNS, score, scores
from fedbn.federation.server import Server, global_columns, served_users
from fedbn.federation.setup import build_context
from fedbn.models import models
from fedbn.stacked.cohort import Failure
from fedbn.stacked.executors import ClientExecutor
from fedbn.strategies.base import Progress, strategies
from fedbn.strategies.silobn import SiloBN
from tests.fedbn.stacked.test_executors import (
    STACKED,
    context_or_skip,
    in_double_precision,
    unequal_users_run,
    with_model,
)

LARGE = {name for name in models() if name.endswith("-cvgj")}


def with_test_sizes(ctx, sizes=(1, 30, 9, 17, 16, 8)):
    """The context with test sets of the given sizes, in another order than the training rows."""
    users = []
    for i, user in enumerate(ctx.population.users):
        pool, n = user.train, sizes[i % len(sizes)]
        rows = torch.arange(n) % len(pool)
        test = Examples(pool.x[rows] * 1.5 + 0.1 * i, pool.y[rows], pool.recording[rows])
        users.append(User(user.name, user.domain, user.train, test))
    return replace(ctx, population=replace(ctx.population, users=tuple(users)))


def train_one_round(ctx):
    """The server and the client states after one round."""
    server, client_states, updates = Server(ctx.initial_server_state(), ctx.initial_server_state()), {}, []
    for user in ctx.trainers:
        update, client_states[user] = client_round(
            ctx, user, server.state_for(ctx, user), None, Progress(1, 1), (), server.broadcast
        )
        updates.append(update)
    server.advance(ctx, updates, 1)
    return server, client_states


def jobs_of(ctx, server, client_states, columns=COLUMNS):
    client_statistics = server.client_statistics or None
    return [
        Evaluate(
            ctx,
            u,
            server.state_for(ctx, u, serving=True),
            client_states.get(u),
            columns,
            global_columns(ctx, u),
            client_statistics,
        )
        for u in served_users(ctx)
    ]


def sequential_results(jobs):
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


def assert_close(actual, expected):
    assert not any(isinstance(scores, Failure) for scores in actual), actual
    assert len(actual) == len(expected)
    for actual_scores, expected_scores in zip(actual, expected, strict=True):
        assert [(s.row, s.column, s.n) for s in actual_scores] == [(s.row, s.column, s.n) for s in expected_scores]
        for a, b in zip(actual_scores, expected_scores, strict=True):
            assert a.accuracy == pytest.approx(b.accuracy, abs=1e-12)
            assert a.macro_f1 == pytest.approx(b.macro_f1, abs=1e-12)
            assert a.loss == pytest.approx(b.loss, rel=1e-9)


def messages_of(caplog):
    return [r.message for r in caplog.records]


@pytest.mark.parametrize("model", ["mlp", "small-cnn"])
@pytest.mark.parametrize("name", strategies())
def test_stacked_evaluation_matches_every_strategy(name, model, caplog):
    if strategies()[name].syncs_first_batch:
        pytest.skip("synchronizes statistics before training")
    ctx = with_test_sizes(in_double_precision(context_or_skip(unequal_users_run(name, model))))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        results = ClientExecutor("stacked", 1).run(jobs)
    assert not messages_of(caplog) or name not in STACKED
    assert_close(results, sequential_results(jobs))


@pytest.mark.parametrize("name", [*sorted(models().keys() - LARGE), "tests.fedbn.stacked.test_executors:network"])
def test_stacked_evaluation_matches_every_model(name):
    ctx = with_test_sizes(with_model(build_context(unequal_users_run(batch_size=8)), name))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    for executor in (ClientExecutor("stacked", 2), ClientExecutor("lean", 1)):
        assert_close(executor.run(jobs), sequential_results(jobs))


def test_stacked_streams_of_different_lengths_in_any_width(monkeypatch):
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run("silobn"))), sizes=(3, 24, 25, 1, 40))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    expected = sequential_results(jobs)
    for width in (1, 2, 3, 7):
        monkeypatch.setattr("fedbn.stacked.executors.stack_width", lambda *_, width=width, **__: width)
        assert_close(ClientExecutor("stacked", 1).run(jobs), expected)


def test_stacked_evaluation_with_zero_and_infinite_prior():
    for prior in (0.0, float("inf")):
        ctx = with_test_sizes(
            in_double_precision(build_context(unequal_users_run("fedbn", online_prior=prior))), sizes=(16, 8)
        )
        jobs = jobs_of(ctx, *train_one_round(ctx), ("online",))
        assert_close(ClientExecutor("stacked", 1).run(jobs), sequential_results(jobs))


def test_stacked_evaluation_on_threads_is_bit_identical(monkeypatch):
    monkeypatch.setattr("fedbn.stacked.executors.MIN_THREADED_SECONDS", 0.0)
    monkeypatch.setattr("fedbn.stacked.executors.stack_width", lambda *_, **__: 2)
    ctx = with_test_sizes(build_context(unequal_users_run("fedbn", "small-cnn")))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    assert ClientExecutor("stacked", 2).run(jobs) == ClientExecutor("stacked", 1).run(jobs)


@pytest.mark.parametrize("rows", [1, 10, 40])
def test_stacked_evaluation_splits_large_inputs(rows, monkeypatch):
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run("fedbn", "small-cnn"))))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    expected = sequential_results(jobs)
    monkeypatch.setattr("fedbn.stacked.evaluate.MAX_INPUT_BYTES", len(jobs) * rows * 64 * 8)
    assert_close(ClientExecutor("stacked", 1).run(jobs), expected)


def test_stacked_evaluation_falls_back_for_online_rules():
    run = replace(unequal_users_run("fedbn-seeded"), partition="", rule="dabn").resolved()
    ctx = in_double_precision(build_context(run))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    expected = sequential_results(jobs)
    assert_close(ClientExecutor("stacked", 1).run(jobs), expected)
    assert {s.column for scores in expected for s in scores} > set(COLUMNS)  # the cold starts of unseen users


class OtherOrder(nn.Module):
    """Computes its layers in another order than that of registration."""

    def __init__(self, shape, classes):
        super().__init__()
        self.last = nn.BatchNorm1d(6)
        self.first = nn.BatchNorm1d(8)
        self.into, self.through, self.out = nn.Linear(64, 8), nn.Linear(8, 6), nn.Linear(6, classes)

    def forward(self, x):
        return self.out(self.last(self.through(self.first(self.into(x.flatten(1))).relu())))


class TwoKinds(nn.Sequential):
    """Has an instance normalization layer with running statistics."""

    def __init__(self, shape, classes):
        kinds = nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU(), nn.BatchNorm2d(3)
        super().__init__(nn.Conv2d(1, 3, 3), *kinds, nn.Flatten(), nn.Linear(108, classes))


@pytest.mark.parametrize("model", ["OtherOrder", "TwoKinds"])
def test_stacked_evaluation_falls_back_for_other_layer_orders(model, monkeypatch):
    ctx = with_test_sizes(
        with_model(build_context(unequal_users_run(batch_size=8)), f"tests.fedbn.stacked.test_evaluate:{model}")
    )
    jobs = jobs_of(ctx, *train_one_round(ctx))
    expected = sequential_results(jobs)
    columns = []
    monkeypatch.setattr(
        "fedbn.stacked.executors.user_scores", lambda *args: columns.append(args[3]) or user_scores(*args)
    )
    assert_close(ClientExecutor("stacked", 1).run(jobs), expected)
    assert set(columns) == {("recalibrated",), ("online",)}


def test_stacked_evaluation_uses_custom_predict_stream(monkeypatch):
    monkeypatch.setattr(SiloBN, "predict_stream", lambda self, model, x: -model.eval()(x).detach())
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run("silobn"))))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    assert_close(ClientExecutor("stacked", 1).run(jobs), sequential_results(jobs))


def test_stacked_evaluation_isolates_user_with_missing_entries():
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run())))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    jobs[1] = replace(jobs[1], received={})
    results = ClientExecutor("stacked", 1).run(jobs)
    assert isinstance(results[1], Failure)
    assert "missing" in str(results[1].error)
    assert_close([results[0], *results[2:]], sequential_results([jobs[0], *jobs[2:]]))


def test_stacked_evaluation_isolates_failing_rule(monkeypatch):
    run = replace(unequal_users_run("silobn"), rule="pseudo").resolved()
    ctx = with_test_sizes(in_double_precision(build_context(run)))
    jobs = jobs_of(ctx, *train_one_round(ctx))

    def failing(ctx, user, *args):
        if user == jobs[2].user:
            raise UserError("too short")
        return user_scores(ctx, user, *args)

    monkeypatch.setattr("fedbn.stacked.executors.user_scores", failing)
    results = ClientExecutor("stacked", 1).run(jobs)
    assert str(results[2].error) == "too short"
    assert [len(s) for i, s in enumerate(results) if i != 2] == [
        len(s) for i, s in enumerate(sequential_results(jobs)) if i != 2
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda jobs: [replace(jobs[0], columns=("aggregated",)), *jobs[1:]], "users have different columns"),
        (lambda jobs: jobs, "evaluation normalizes by batch statistics"),
    ],
)
def test_stacked_evaluation_logs_fallback_once(change, reason, caplog):
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run())), sizes=(9, 30))
    if "batch" in reason:
        ctx = with_model(ctx, "tests.fedbn.stacked.test_evaluate:batchwise")
    jobs = change(jobs_of(ctx, *train_one_round(ctx), COLUMNS if "columns" in reason else ("aggregated",)))
    executor = ClientExecutor("stacked", 1)
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        for _ in range(2):
            assert_close(executor.run(jobs), sequential_results(jobs))
    assert messages_of(caplog) == [f"evaluating user by user: {reason}"]


def batchwise(shape, classes):
    """A model that normalizes by batch statistics in evaluation too."""
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 8), norm, nn.Linear(8, classes))


def test_stacked_evaluation_falls_back_for_personalized_models(caplog):
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run("fedbn+finetune", proximal=0.0))))
    jobs = jobs_of(ctx, *train_one_round(ctx))
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        assert_close(ClientExecutor("stacked", 1).run(jobs), sequential_results(jobs))
    assert messages_of(caplog) == ["evaluating user by user: finetune serves personalized models"]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_scores_of_stack_match_single_scores(k, width, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(k, width, classes, generator=draw)
    y = torch.randint(0, classes, (k, width), generator=draw)
    n = torch.randint(1, width + 1, (k,), generator=draw).tolist()
    expected = [score("own", "online", outputs[i, : n[i]], y[i, : n[i]]) for i in range(k)]
    assert_close([scores(["own"] * k, "online", outputs, y, n)], [expected])
