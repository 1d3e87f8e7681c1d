"""The in-process grid runs the Flower apps with the results of the reference loop, bit by bit."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

import fedbn_clients.app
from fedbn.errors import UserError
from fedbn.federation.failures import ClientError
from fedbn.federation.metrics import Score
from fedbn.federation.setup import build_context
from fedbn.strategies.base import strategies
from fedbn_clients.app import app as client_app
from fedbn_clients.config import run_from_config
from fedbn_clients.records import scores_from, scores_to
from fedbn_simulations.engines import grid
from fedbn_simulations.engines.deployment import differences
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import FIRST_NODE, InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.nodes import NodePool
from fedbn_simulations.server.rounds import run_rounds
from tests.helpers import mostly_slow, same, sampling_options


def assert_same(a, b):
    assert differences(a, b) == ()
    assert a.client_states.keys() == b.client_states.keys()
    assert all(same(a.client_states[u], b.client_states[u]) for u in a.client_states)


def grid_of(run, app=client_app, **options):
    users = build_context(run).population.users
    return InProcessGrid(app, len(users), {"run": run.to_json()}, **options)


QUICK = (
    "bn-similarity",
    "fedbn",
    "fedbn-seeded",
    "fedtan",
    "global-pooled",
    "global-recalibrated",
    "hbn-full",
    "local",
)
"""Strategies with different exchanges."""


@pytest.mark.parametrize("name", mostly_slow(strategies(), *QUICK))
def test_grid_matches_reference_loop(name, small):
    run = small(name, optimizer_state="keep", proximal=0.01, **sampling_options(name))
    assert_same(execute(run, "reference"), execute(run, "grid"))


@pytest.mark.parametrize(
    "optimizer", ["fedadam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fedavgm", "fedyogi", "fedadagrad"))]
)
def test_grid_matches_reference_loop_with_server_optimizers(optimizer, small):
    run = small("global-pooled", server_optimizer=optimizer, server_lr=0.1, weighting="uniform")
    a, b = execute(run, "reference"), execute(run, "grid")
    assert_same(a, b)
    assert a.server.memory


TRAINING = {
    "adam": {"optimizer": "adam", "max_grad_norm": 0.5, "augment": "translate+jitter", "schedule": "cosine"},
    "adamw": {"optimizer": "adamw", "warmup": 1},
    "rmsprop": {"optimizer": "rmsprop:momentum=0.9", "augment": "flip"},
    "factory": {"optimizer": "torch.optim:Adagrad", "schedule": "step:every=1"},
}


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("fedbn", "adam"),
        *(pytest.param("fedbn", name, marks=pytest.mark.slow) for name in ("adamw", "rmsprop", "factory")),
        *(pytest.param("fedtan", name, marks=pytest.mark.slow) for name in TRAINING),
    ],
)
def test_grid_matches_reference_loop_with_client_optimizers(strategy, name, small):
    run = small(strategy, optimizer_state="keep", clients_per_round=3, global_test=20, **TRAINING[name])
    a, b = execute(run, "reference"), execute(run, "grid")
    assert_same(a, b)
    plain = execute(small(strategy, clients_per_round=3, global_test=20), "reference")
    assert a.curve[0].train_loss != plain.curve[0].train_loss


@pytest.mark.slow
def test_local_entries_are_never_in_messages(small):
    for name in strategies():
        run = small(name, rounds=1, **sampling_options(name))
        ctx = build_context(run)
        forbidden = set(ctx.ownership.roles) - set(ctx.ownership.travels)
        names = []

        def spy(message, context, call_next):
            reply = call_next(message, context)
            for content in (message.content, reply.content):
                names.extend(k for r in content.array_records.values() for k in r)
            return reply

        app = ClientApp(mods=[spy])
        for kind in ("train", "evaluate"):
            getattr(app, kind)()(getattr(fedbn_clients.app, kind))
        for action in ("sync_statistics", "sync_first_batch", "partition"):
            app.query(action)(getattr(fedbn_clients.app, action))
        with task_identity(1):
            run_rounds(grid_of(run, app), run)
        assert not forbidden & set(names), name
        if ctx.ownership.travels:
            assert set(ctx.ownership.travels) <= set(names)


def test_grid_reports_client_failure_and_restores_state(small):
    run = small("fedbn")

    def fault(message):
        return "battery empty" if message.metadata.dst_node_id == FIRST_NODE + 2 else None

    with task_identity(1), pytest.raises(ClientError, match="no node for user 2 after 0.1 s"):
        run_rounds(grid_of(run, fault=fault), run, wait=0.1)
    app = ClientApp()

    @app.train()
    def train(message, context):
        context.state["x"] = ConfigRecord({"a": 1})
        context.state["old"]["b"] = 1
        raise RuntimeError("boom")

    grid = InProcessGrid(app, 1, {})
    grid.partition_context(0).state["old"] = ConfigRecord({"b": 0})
    with task_identity(1):
        (reply,) = grid.send_and_receive([Message(RecordDict(), n, "train") for n in grid.get_node_ids()])
    assert (reply.error.code, reply.error.reason) == (100, "RuntimeError")
    assert grid.partition_context(0).state == RecordDict({"old": ConfigRecord({"b": 0})})


def test_clients_do_not_share_message_content():
    app = ClientApp()

    @app.train()
    def train(message, context):
        assert "mark" not in message.content["config"]
        message.content["config"]["mark"] = 1
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, {})
    shared = RecordDict({"config": ConfigRecord({"a": 0})})
    with task_identity(1):
        replies = grid.send_and_receive([Message(shared, n, "train") for n in grid.get_node_ids()])
    assert not any(r.has_error() for r in replies)
    assert "mark" not in shared["config"]


def test_results_do_not_depend_on_node_ids(small):
    run = small("silobn", clients_per_round=3)
    outcomes = []
    for first in (7, 500):
        with task_identity(1):
            outcomes.append(run_rounds(grid_of(run, first_node=first), run))
    assert same(outcomes[0].server.state, outcomes[1].server.state)
    assert outcomes[0].scores == outcomes[1].scores


def test_grid_replies_with_error_for_unknown_node():
    grid = InProcessGrid(client_app, 2, {})
    with task_identity(1):
        (reply,) = grid.send_and_receive([Message(RecordDict(), 3, "train")])
    assert reply.error.reason == "no such node"


def test_node_pool_finds_users_by_partition_id(small):
    run = small()
    users = len(build_context(run).population.users)
    with task_identity(1):
        nodes = NodePool(grid_of(run), users)
    assert nodes.node == {i: FIRST_NODE + i for i in range(users)}


def test_scores_round_trip_through_records():
    scores = [Score("own", "aggregated", 7, {"a": 1 / 3, "b": 0.1 + 0.2}), Score("global", "online", 1, {"a": 0.0})]
    assert scores_from(scores_to(scores)) == scores


def test_run_from_config_reads_json_and_flat_keys(small):
    run = small("groupnorm:groups=2", rounds=3, momentum=0.0)
    assert run_from_config({"run": run.to_json()}) == run
    config = {"scenario": "digits8", "strategy": "silobn", "seed": 2, "plan": "rounds=3,momentum=0", "out": ""}
    assert run_from_config(config).plan.momentum == 0
    assert run_from_config(config).seed == 2
    with pytest.raises(UserError, match=r"write settings as rounds=5,lr=0.1, not 'rounds'"):
        run_from_config({"scenario": "digits8", "strategy": "fedbn", "plan": "rounds"})


def test_max_open_calls_does_not_change_results(small, monkeypatch):
    run, open_calls = small("fedbn"), []
    expected = execute(run, "grid")
    real = grid.run_batched

    def counted(calls, run_jobs):
        open_calls.append(len(calls))
        return real(calls, run_jobs)

    monkeypatch.setattr(grid, "run_batched", counted)
    monkeypatch.setattr(grid, "MAX_OPEN_CALLS", 3)
    assert_same(execute(run, "grid"), expected)
    assert max(open_calls) == 3
