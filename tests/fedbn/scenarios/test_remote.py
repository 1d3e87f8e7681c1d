"""Data that lie with the nodes: a node trains on its own file, and the numbers are those of all files in one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.app import app as client_app
from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.loop import federate
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.scenarios.remote import own
from fedbn.seeds import numpy_generator
from simulations.engines.grid import InProcessGrid
from simulations.flower.compat import task_identity
from simulations.server.nodes import ClientError
from simulations.server.rounds import run_rounds
from tests.helpers import same

USERS, CLASSES, ROWS = 3, 3, 40
SCENARIO = f"remote:users={USERS}:classes={CLASSES}:shape=6:unseen=0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return files_in(tmp_path_factory.mktemp("nodes"))


def files_in(place):
    """One file a user, and one of all."""
    draw = numpy_generator(0, "nodes")
    y = np.tile(np.arange(ROWS) % CLASSES, (USERS, 1))
    x = draw.normal(size=(USERS, ROWS, 6)).astype(np.float32) + y[:, :, None] + np.arange(USERS)[:, None, None]
    for user in range(USERS):
        np.savez(place / f"{user}.npz", x=x[user], y=y[user])
    np.savez(place / "all.npz", x=x.reshape(-1, 6), y=y.ravel(), user=np.repeat(np.arange(USERS), ROWS))
    return place


class Nodes(InProcessGrid):
    """Nodes that know their own file."""

    def __init__(self, run, files):
        super().__init__(client_app, USERS, {"run": run.to_json()})
        self.files = files

    def context(self, node):
        context = super().context(node)
        if (file := self.files(context.node_config["partition-id"])) is not None:
            context.node_config["data"] = str(file)
        return context


def run_of(text, strategy="fedbn", rounds=3):
    plan = Plan(rounds=rounds, eval_every=1, batch_size=8, lr=0.05)
    return Run(text, strategy, model="mlp", plan=plan).resolved()


def served(run, files):
    with task_identity(1):
        return run_rounds(Nodes(run, files), run)


@pytest.mark.parametrize("strategy", ["fedbn", "global-pooled", "global-recalibrated"])
def test_nodes_with_their_own_files_give_the_bits_of_all_in_one_place(strategy, place):
    outcome = served(run_of(SCENARIO, strategy), lambda user: place / f"{user}.npz")
    together = federate(run_of(f"files:path={place / 'all.npz'}:unseen=0", strategy))
    assert same(outcome.server.state, together.server.state)
    assert outcome.curve == together.curve
    assert {u: [s for s in scores if s.row == "own"] for u, scores in outcome.scores.items()} == {
        u: [s for s in scores if s.row == "own"] for u, scores in together.scores.items()
    }
    assert {s.row for scores in outcome.scores.values() for s in scores} == {"own"}


def test_what_stands_in_for_data_is_not_trained_on(place):
    with pytest.raises(ClientError, match=r'name this node.s data in its node config, as data="PATH"'):
        served(run_of(SCENARIO), lambda user: place / "0.npz" if user == 0 else None)


def test_the_server_reads_no_file(place, monkeypatch):
    def read(path):
        raise AssertionError(path)

    monkeypatch.setattr("fedbn.scenarios.files.read", read)
    build_context.cache_clear()
    assert build_context(run_of(SCENARIO)).population.sources == {}
    with pytest.raises(AssertionError):
        own(SCENARIO, str(place / "0.npz"))


def wrong(place, **arrays):
    base = {"x": np.zeros((ROWS, 6), np.float32), "y": np.arange(ROWS) % CLASSES}
    np.savez(place / "wrong.npz", **(base | arrays))
    return place / "wrong.npz"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((ROWS, 5))}, r"holds examples of shape \[5\], not \[6\]"),
        ({"y": np.arange(ROWS) % 4}, "labels run from 0 to 3, but classes are numbered 0 to 2"),
        ({"y": np.full(ROWS, "walk")}, "classes must be numbers 0 to 2 here"),
        ({"x": np.full((ROWS, 6), np.nan)}, "x holds 240 NaN or infinite values"),
    ],
)
def test_a_file_that_does_not_fit_is_named(arrays, message, place, tmp_path):
    file = wrong(tmp_path, **arrays)
    with pytest.raises(ClientError, match=message):
        served(run_of(SCENARIO), lambda user: file)


def test_a_file_that_is_not_there(place):
    with pytest.raises(ClientError, match="there is no file"):
        served(run_of(SCENARIO), lambda user: place / "nowhere.npz")


def test_a_node_with_data_for_a_scenario_that_has_its_own(place):
    run = run_of(f"files:path={place / 'all.npz'}:unseen=0")
    with pytest.raises(ClientError, match=r"this node has data=.*0\.npz, but scenario files:.* use remote"):
        served(run, lambda user: place / "0.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "centralized"}, "brings all data to one place, but here they stay with the nodes"),
        ({"partition": "dirichlet:alpha=0.5:clients=3"}, "cannot be partitioned, shifted or split here"),
        ({"validation": True}, "cannot be partitioned, shifted or split here"),
    ],
)
def test_what_needs_all_data_is_refused_before_anything_runs(change, message):
    values = {"scenario": SCENARIO, "strategy": "fedbn", "model": "mlp"} | change
    with pytest.raises(UserError, match=message):
        build_context(Run(**values).resolved())


@pytest.mark.parametrize("text", ["remote:users=0", "remote:classes=1", "remote:shape=0"])
def test_a_description_that_makes_no_sense(text):
    with pytest.raises(UserError, match="at least 1 user, 2 classes and a shape"):
        build_context(Run(text, "fedbn").resolved())


def test_rows_that_are_flat_take_the_shape_of_the_scenario(place):
    user = own("remote:shape=2+3:classes=3", str(place / "0.npz"))
    assert user.train.x.shape[1:] == (2, 3)
    assert torch.equal(user.train.x[0].flatten(), own(SCENARIO, str(place / "0.npz")).train.x[0])
