"""Training of a cohort without messages has the bits of training with messages on the same kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedbn.federation.client_table import ClientTable
from fedbn.federation.setup import build_context
from fedbn_clients.app import app
from fedbn_simulations.engines.deployment import differences
from fedbn_simulations.engines.execute import execute
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import run_rounds
from fedbn_simulations.storage.checkpoint import load_outcome, save_outcome
from tests.helpers import mostly_slow, same


def assert_same(a, b):
    assert differences(a, b) == ()
    for states in ("client_states", "client_statistics"):
        x, y = (getattr(o if states == "client_states" else o.server, states) for o in (a, b))
        assert x.keys() == y.keys()
        assert all(same(x[user], y[user]) for user in x)


def count_messages(monkeypatch):
    """Kinds of all messages that clients handle from now on."""
    kinds = []
    deliver = InProcessGrid._deliver
    monkeypatch.setattr(InProcessGrid, "_deliver", lambda s, m: kinds.append(m.metadata.message_type) or deliver(s, m))
    return kinds


CASES = {
    "fedbn": ("fedbn", {}),
    "sampled": ("fedbn-seeded", {"clients_per_round": 3, "optimizer_state": "keep", "momentum": 0.9}),
    "pooled": ("global-pooled", {"local_epochs": 2, "weighting": "uniform"}),
    "groups": ("fednorm", {"optimizer": "adam", "optimizer_state": "keep"}),
    "local": ("local", {"proximal": 0.1, "clients_per_round": 2}),
    "dropout": ("silobn", {"model": "tests.fedbn.stacked.test_executors:network", "augment": "jitter"}),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, "sampled", "groups", "dropout"))
def test_cohort_matches_messages(case, small, monkeypatch):
    name, settings = CASES[case]
    run = small(name, **{"model": "mlp", "rounds": 3, "eval_every": 2, **settings})
    kinds = count_messages(monkeypatch)
    cohort = execute(run, "grid:stacked")
    assert "train" not in kinds
    monkeypatch.setattr(InProcessGrid, "train_cohort", lambda *args: None)
    messages = execute(run, "grid:stacked")
    assert "train" in kinds
    assert isinstance(cohort.client_states, ClientTable)
    assert cohort.execution == messages.execution
    assert_same(cohort, messages)


def test_cohort_resumes_from_checkpoint(small, tmp_path):
    run = small("fedbn-seeded", model="mlp", rounds=3, clients_per_round=3)
    path = tmp_path / "checkpoint"

    def on_round(number, outcome):
        if number == 1:
            save_outcome(path, run, outcome)

    complete = execute(run, "grid:stacked", on_round=on_round)
    start = load_outcome(path, run)
    assert len(start.client_states) == 3
    assert_same(execute(run, "grid:stacked", resume=start), complete)


def test_cohort_mixes_with_messages(small, monkeypatch):
    run = small("fedbn", model="mlp", rounds=3)
    expected = execute(run, "grid:stacked")
    train, calls = InProcessGrid.train_cohort, []
    monkeypatch.setattr(
        InProcessGrid, "train_cohort", lambda *args: None if calls.append(1) or len(calls) == 2 else train(*args)
    )
    assert_same(execute(run, "grid:stacked"), expected)


def test_failing_cohort_trains_with_messages(small, monkeypatch, caplog):
    run, attempts = small("fedbn", model="mlp", rounds=2), []
    expected = execute(run, "grid:stacked")

    def fails(*args, **kwargs):
        attempts.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedbn.stacked.cohort.Cohort.train_part", fails)
    assert_same(execute(run, "grid:stacked"), expected)
    assert len(attempts) == 1, "the second round does not try again"
    assert "in one call failed with RuntimeError" in caplog.text
    assert "out of memory" not in "".join(r.message for r in caplog.records if r.levelname == "WARNING")


class Counted(InProcessGrid):
    """A subclass can change how messages are delivered."""


GRIDS = {
    "fault": lambda run, n: InProcessGrid(app, n, run, fault=lambda message: None, executor="stacked"),
    "foreign": lambda run, n: InProcessGrid(lambda m, c: app(m, c), n, run, executor="stacked"),
    "subclass": lambda run, n: Counted(app, n, run, executor="stacked"),
    "exact": lambda run, n: InProcessGrid(app, n, run),
    "lean": lambda run, n: InProcessGrid(app, n, run, executor="lean"),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_grid_sends_messages_where_they_matter(kind, small, monkeypatch):
    run, kinds = small("fedbn", model="mlp", rounds=1), count_messages(monkeypatch)
    users = len(build_context(run).population.users)
    with task_identity(1):
        run_rounds(GRIDS[kind]({"run": run.to_json()}, users), run)
    assert "train" in kinds


def test_private_updates_are_messages(small, monkeypatch):
    kinds = count_messages(monkeypatch)
    run = small("fedbn", model="mlp", rounds=1)
    execute(replace(run, privacy="clip=1"), "grid:stacked")
    assert "train" in kinds
