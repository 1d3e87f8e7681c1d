"""Stacked evaluation equals the evaluation of each user by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbn.data.population import Examples, User
from fedbn.errors import UserError
from fedbn.federation.client import client_evaluation, client_round, user_scores
from fedbn.federation.cold_start import summarize
from fedbn.federation.metrics import COLUMNS, score, scores
from fedbn.federation.server import Server, global_columns, served_users
from fedbn.federation.setup import build_context
from fedbn.stacked.cohort import Failure
from fedbn.stacked.evaluate import PaddedBatch
from fedbn.stacked.executors import ClientExecutor
from fedbn.strategies.base import Progress, strategies
from fedbn.strategies.silobn import SiloBN
from fedbn.tasks.classification import Classification
from fedbn_clients.jobs import Evaluate
from tests.fedbn.stacked.test_executors import (
    ALL_MODELS,
    STACKED,
    context_or_skip,
    in_double_precision,
    strategies_and_models,
    unequal_users_run,
    with_model,
)


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


def jobs_of(ctx, columns=COLUMNS):
    """Evaluations of all users after one round."""
    server, client_states = train_one_round(ctx)
    summary = summarize(ctx, server.client_statistics)

    def job(user):
        state, own = server.state_for(ctx, user, serving=True), client_states.get(user)
        return Evaluate(ctx, user, state, own, columns, global_columns(ctx, user), summary)

    return [job(user) for user in served_users(ctx)]


def double_jobs(ctx, columns=COLUMNS, **sizes):
    """Evaluations in double precision."""
    return jobs_of(with_test_sizes(in_double_precision(ctx), **sizes), columns)


def model_jobs(name):
    """Evaluations with another model."""
    return jobs_of(with_test_sizes(with_model(build_context(unequal_users_run(batch_size=8)), name)))


def sequential_results(jobs):
    def evaluate(job):
        names = "columns", "globally", "client_statistics", "final"
        options = {name: getattr(job, name) for name in names}
        return client_evaluation(job.ctx, job.user, job.received, job.client_state, **options)

    return [evaluate(job) for job in jobs]


def assert_close(actual, expected):
    assert not any(isinstance(scores, Failure) for scores in actual), actual
    assert len(actual) == len(expected)
    for actual_scores, expected_scores in zip(actual, expected, strict=True):
        assert [(s.row, s.column, s.n) for s in actual_scores] == [(s.row, s.column, s.n) for s in expected_scores]
        for a, b in zip(actual_scores, expected_scores, strict=True):
            assert a.metrics == pytest.approx(b.metrics, rel=1e-9, abs=1e-12)


def assert_stacked_matches(jobs, expected=None):
    """Compare stacked evaluation with the sequential one; returns how the jobs were executed."""
    executor = ClientExecutor("stacked", 1)
    assert_close(executor.run(jobs), sequential_results(jobs) if expected is None else expected)
    return executor.execution["evaluate"]


QUICK = ("fedbn", "evalnorm", "batch-renorm", "hbn", "groupnorm")


@pytest.mark.parametrize(("name", "model"), strategies_and_models(strategies(), *QUICK))
def test_stacked_evaluation_matches_every_strategy(name, model):
    if strategies()[name].syncs_first_batch:
        pytest.skip("synchronizes statistics before training")
    how = assert_stacked_matches(double_jobs(context_or_skip(unequal_users_run(name, model))))
    assert how == ["stacked"] or name not in STACKED


@pytest.mark.parametrize("name", ALL_MODELS)
def test_stacked_evaluation_matches_every_model(name):
    jobs = model_jobs(name)
    for executor in (ClientExecutor("stacked", 2), ClientExecutor("lean", 1)):
        assert_close(executor.run(jobs), sequential_results(jobs))


def test_stacked_streams_of_different_lengths_in_any_width(monkeypatch):
    jobs = double_jobs(build_context(unequal_users_run("silobn")), sizes=(3, 24, 25, 1, 40))
    expected = sequential_results(jobs)
    for width in (1, 2, 3, 7):
        monkeypatch.setattr("fedbn.stacked.executors.stack_width", lambda *_, width=width, **__: width)
        assert_stacked_matches(jobs, expected)


def test_stacked_evaluation_with_zero_and_infinite_prior():
    for prior in (0.0, float("inf")):
        ctx = build_context(unequal_users_run(online_prior=prior))
        assert_stacked_matches(double_jobs(ctx, ("online",), sizes=(16, 8)))


def test_stacked_evaluation_on_threads_is_bit_identical(monkeypatch):
    monkeypatch.setattr("fedbn.stacked.executors.MIN_THREADED_SECONDS", 0.0)
    monkeypatch.setattr("fedbn.stacked.executors.stack_width", lambda *_, **__: 2)
    jobs = jobs_of(with_test_sizes(build_context(unequal_users_run("fedbn", "small-cnn"))))
    assert ClientExecutor("stacked", 2).run(jobs) == ClientExecutor("stacked", 1).run(jobs)


@pytest.mark.parametrize(
    ("limit", "lengths"), [(1, [1] * 5), (2 * 3 * 4, [1] * 5), (2 * 3 * 4 * 2, [2, 2, 1]), (999, [5])]
)
def test_padded_batch_splits_by_bytes_of_all_users(limit, lengths, monkeypatch):
    monkeypatch.setattr("fedbn.stacked.evaluate.MAX_INPUT_BYTES", limit)
    batch = PaddedBatch.of([torch.arange(6.0).view(2, 3), torch.arange(15.0).view(5, 3)])
    parts = batch.split()
    assert [p.x.shape[1] for p in parts] == lengths
    assert torch.equal(torch.cat([p.x for p in parts], 1), batch.x)
    assert np.sum([p.n for p in parts], 0).tolist() == [2, 5]
    assert all(0 <= n <= p.x.shape[1] for p in parts for n in p.n)


@pytest.mark.parametrize("rows", [1, 10, 40])
def test_stacked_evaluation_splits_large_inputs(rows, monkeypatch):
    jobs = double_jobs(build_context(unequal_users_run("fedbn", "small-cnn")))
    monkeypatch.setattr("fedbn.stacked.evaluate.MAX_INPUT_BYTES", len(jobs) * rows * 64 * 8)
    assert_stacked_matches(jobs)


def test_stacked_evaluation_falls_back_for_online_rules():
    run = replace(unequal_users_run("fedbn-seeded"), partition="", rule="dabn").resolved()
    jobs = jobs_of(in_double_precision(build_context(run)))
    expected = sequential_results(jobs)
    assert_stacked_matches(jobs, expected)
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
    columns = []

    def recorded(*args, **options):
        columns.append(args[3])
        return user_scores(*args, **options)

    monkeypatch.setattr("fedbn.stacked.executors.user_scores", recorded)
    assert_stacked_matches(model_jobs(f"tests.fedbn.stacked.test_evaluate:{model}"))
    assert set(columns) == {("recalibrated",), ("online",)}


def test_stacked_evaluation_before_the_last_round_has_metrics_of_curves_only():
    jobs = [replace(job, final=False) for job in double_jobs(build_context(unequal_users_run()))]
    assert_stacked_matches(jobs)
    ((first, *_), *_) = ClientExecutor("stacked", 1).run(jobs)
    assert set(first.metrics) == {"accuracy", "macro_f1", "loss"}


def test_stacked_evaluation_uses_custom_predict_stream(monkeypatch):
    monkeypatch.setattr(SiloBN, "predict_stream", lambda self, model, x: -model.eval()(x).detach())
    assert_stacked_matches(double_jobs(build_context(unequal_users_run("silobn"))))


def test_stacked_evaluation_isolates_user_with_missing_entries():
    jobs = double_jobs(build_context(unequal_users_run()))
    jobs[1] = replace(jobs[1], received={})
    results = ClientExecutor("stacked", 1).run(jobs)
    assert isinstance(results[1], Failure)
    assert "missing" in str(results[1].error)
    assert_close([results[0], *results[2:]], sequential_results([jobs[0], *jobs[2:]]))


def test_stacked_evaluation_isolates_failing_rule(monkeypatch):
    jobs = double_jobs(build_context(replace(unequal_users_run("silobn"), rule="pseudo").resolved()))

    def failing(ctx, user, *args, **options):
        if user == jobs[2].user:
            raise UserError("too short")
        return user_scores(ctx, user, *args, **options)

    monkeypatch.setattr("fedbn.stacked.executors.user_scores", failing)
    results = ClientExecutor("stacked", 1).run(jobs)
    assert str(results[2].error) == "too short"
    lengths, expected = ([len(s) for i, s in enumerate(r) if i != 2] for r in (results, sequential_results(jobs)))
    assert lengths == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda jobs: [replace(jobs[0], columns=("aggregated",)), *jobs[1:]], "users have different columns"),
        (lambda jobs: jobs, "rows of a batch depend on each other in evaluation"),
    ],
)
def test_stacked_evaluation_records_fallback_once(change, reason):
    ctx = with_test_sizes(in_double_precision(build_context(unequal_users_run())), sizes=(9, 30))
    if "batch" in reason:
        ctx = with_model(ctx, "tests.fedbn.stacked.test_evaluate:batchwise")
    jobs = change(jobs_of(ctx, COLUMNS if "columns" in reason else ("aggregated",)))
    executor = ClientExecutor("stacked", 1)
    for _ in range(2):
        assert_close(executor.run(jobs), sequential_results(jobs))
    assert executor.execution == {"evaluate": [reason]}


def batchwise(shape, classes):
    """A model that normalizes by batch statistics in evaluation too."""
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 8), norm, nn.Linear(8, classes))


def test_stacked_evaluation_falls_back_for_personalized_models():
    how = assert_stacked_matches(double_jobs(build_context(unequal_users_run("fedbn+finetune", proximal=0.0))))
    assert how == ["users have personalized models"]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_scores_of_stack_match_single_scores(k, width, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(k, width, classes, generator=draw)
    y = torch.randint(0, classes, (k, width), generator=draw)
    n = torch.randint(1, width + 1, (k,), generator=draw).tolist()
    expected = [score(Classification(), "own", "online", outputs[i, : n[i]], y[i, : n[i]]) for i in range(k)]
    assert_close([scores(Classification(), ["own"] * k, "online", outputs, y, n)], [expected])
