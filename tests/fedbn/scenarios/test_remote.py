"""Scenario remote: nodes train on their own files, with the same results as with all files in one place."""

from __future__ import annotations

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fedbn.config import Plan
from fedbn.federation.failures import ClientError
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.scenarios.remote import load_node_user
from fedbn.seeds import numpy_generator
from fedbn_clients.app import app as client_app
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import run_rounds
from tests.fedbn.helpers import rejects
from tests.helpers import same

USERS, CLASSES, ROWS = 3, 3, 40
SCENARIO = f"remote:users={USERS}:classes={CLASSES}:shape=6:unseen=0"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_node_files(tmp_path_factory.mktemp("nodes"))


def write_node_files(directory):
    """Write one file per user, and one with the data of all users."""
    rng = numpy_generator(0, "nodes")
    y = np.tile(np.arange(ROWS) % CLASSES, (USERS, 1))
    x = rng.normal(size=(USERS, ROWS, 6)).astype(np.float32) + y[:, :, None] + np.arange(USERS)[:, None, None]
    for user in range(USERS):
        np.savez(directory / f"{user}.npz", x=x[user], y=y[user])
    np.savez(directory / "all.npz", x=x.reshape(-1, 6), y=y.ravel(), user=np.repeat(np.arange(USERS), ROWS))
    return directory


class Nodes(InProcessGrid):
    """Nodes with one data file each."""

    def __init__(self, run, files):
        super().__init__(client_app, USERS, {"run": run.to_json()})
        self.files = files

    def context(self, node):
        context = super().context(node)
        if (file := self.files(context.node_config["partition-id"])) is not None:
            context.node_config["data"] = str(file)
        return context


def make_run(text, strategy="fedbn", rounds=3):
    plan = Plan(rounds=rounds, eval_every=1, batch_size=8, lr=0.05)
    return Run(text, strategy, model="mlp", plan=plan).resolved()


def run_on_nodes(run, files):
    with task_identity(1):
        return run_rounds(Nodes(run, files), run)


@pytest.mark.parametrize("strategy", ["fedbn", "global-pooled", "global-recalibrated"])
def test_nodes_match_centrally_stored_files(strategy, directory):
    result = run_on_nodes(make_run(SCENARIO, strategy), lambda user: directory / f"{user}.npz")
    expected = federate(make_run(f"files:path={directory / 'all.npz'}:unseen=0", strategy))
    assert same(result.server.state, expected.server.state)
    assert result.curve == expected.curve
    own = [{u: [s for s in v if s.row == "own"] for u, v in r.scores.items()} for r in (result, expected)]
    assert own[0] == own[1]
    assert {s.row for scores in result.scores.values() for s in scores} == {"own"}


def test_node_without_data_is_rejected(directory, caplog):
    with fails_on_node(r'set this node.s data in its node config, as data="PATH"', caplog):
        run_on_nodes(make_run(SCENARIO), lambda user: directory / "0.npz" if user == 0 else None)


@contextmanager
def fails_on_node(message, caplog):
    """Expect a user error that only the log of the node explains."""
    with pytest.raises(ClientError, match=r"^train, user \d: UserError \(code 101: .*\); the log of this client"):
        yield
    assert re.search(message, caplog.text)


def test_server_reads_no_file(directory, monkeypatch):
    def read(path):
        raise AssertionError(path)

    monkeypatch.setattr("fedbn.data.folders.read", read)
    build_context.cache_clear()
    assert build_context(make_run(SCENARIO)).population.sources == {}
    with pytest.raises(AssertionError):
        load_node_user(SCENARIO, str(directory / "0.npz"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((ROWS, 5))}, r"holds examples of shape \[5\], not \[6\]"),
        ({"y": np.arange(ROWS) % 4}, "labels run from 0 to 3, but classes must be numbered 0 to 2"),
        ({"y": np.full(ROWS, "walk")}, "classes must be numbers 0 to 2 here"),
        ({"x": np.full((ROWS, 6), np.nan)}, "x holds 240 NaN or infinite values"),
    ],
)
def test_node_rejects_bad_file(arrays, message, tmp_path, caplog):
    good = {"x": np.zeros((ROWS, 6), np.float32), "y": np.arange(ROWS) % CLASSES}
    np.savez(tmp_path / "bad.npz", **(good | arrays))
    with fails_on_node(message, caplog):
        run_on_nodes(make_run(SCENARIO), lambda user: tmp_path / "bad.npz")


def test_node_rejects_missing_file(directory, caplog):
    with fails_on_node("there is no file", caplog):
        run_on_nodes(make_run(SCENARIO), lambda user: directory / "nowhere.npz")


def test_node_rejects_data_for_other_scenario(directory, caplog):
    run = make_run(f"files:path={directory / 'all.npz'}:unseen=0")
    with fails_on_node(r"this node has data=.*0\.npz, but scenario files:.* use scenario remote", caplog):
        run_on_nodes(run, lambda user: directory / "0.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "centralized"}, "pools all data in one place, but here the data stay on the nodes"),
        ({"partition": "dirichlet:alpha=0.5:clients=3"}, "cannot be partitioned, shifted or split here"),
        ({"validation": True}, "cannot be partitioned, shifted or split here"),
    ],
)
def test_build_context_rejects_options_that_need_all_data(change, message):
    values = {"scenario": SCENARIO, "strategy": "fedbn", "model": "mlp"} | change
    rejects(message, lambda: build_context(Run(**values).resolved()))


@pytest.mark.parametrize("text", ["remote:users=0", "remote:classes=1", "remote:shape=0"])
def test_remote_rejects_bad_input(text):
    rejects("at least 1 user, 2 classes and a shape", lambda: build_context(Run(text, "fedbn").resolved()))


def test_load_node_user_reshapes_flat_rows(directory):
    user = load_node_user("remote:shape=2+3:classes=3", str(directory / "0.npz"))
    assert user.train.x.shape[1:] == (2, 3)
    assert torch.equal(user.train.x[0].flatten(), load_node_user(SCENARIO, str(directory / "0.npz")).train.x[0])
