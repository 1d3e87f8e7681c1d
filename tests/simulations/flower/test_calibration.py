from __future__ import annotations

import itertools

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedbn.errors import UserError
from fedbn.online.prior import population_prior as population_prior_of_users
from fedbn.online.rules.base import rule
from fedbn.online.stream import follow_rule
from fedbn_clients.mods import PRIOR, adaptation
from fedbn_clients.mods import normalization as client_normalization
from fedbn_clients.records import prior_from
from fedbn_simulations.flower.calibration import population_prior
from fedbn_simulations.flower.strategies import normalization
from tests.flower_apps import data, initial_state, message_app, simulate

NORMS = "fedbn-seeded"


class Net(nn.Sequential):
    """The input of the second normalization layer depends on the entries of the first."""

    def __init__(self):
        norms = (nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        super().__init__(nn.Linear(4, 6, bias=False), *norms, nn.Linear(5, 1))


def windows(context):
    """A client's unlabeled data, in batches."""
    return data(context.node_config["partition-id"])[0].split(20)


def server_with_prior(predict=lambda grid, content: None, rounds=1):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        app.arrays = ArrayRecord(initial_state(Net))
        if rounds:
            strategy = normalization(FedAvg(min_available_nodes=3), Net, NORMS)
            app.arrays = strategy.start(grid, app.arrays, num_rounds=rounds).arrays
        app.prior = population_prior(grid, app.arrays, Net)
        predict(grid, RecordDict({"arrays": app.arrays, PRIOR: app.prior}))

    return app


def source(arrays):
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    return net.eval()


def test_population_prior_of_clients_equals_that_of_their_windows():
    """Under the server's arrays, also where clients have their own entries."""
    app = server_with_prior()
    grid = simulate(app, message_app([client_normalization(Net, NORMS, windows)], net=Net))
    expected = population_prior_of_users(source(app.arrays), [data(i)[0] for i in range(3)])
    prior = prior_from(app.prior)
    assert list(prior) == list(expected) == ["1", "4"]
    for path, name in itertools.product(prior, ("mean", "var", "n0")):
        assert torch.equal(getattr(prior[path], name), getattr(expected[path], name)), (path, name)
    assert len(set(prior["4"].n0.tolist())) > 1
    own = grid.partition_context(0).state["fedbn.normalization"]
    assert own["1.running_mean"].data != app.arrays["1.running_mean"].data


def test_new_client_follows_its_stream_from_the_prior_in_the_message():
    replies, seen, x = [], [], data(7)[0]

    def predict(grid, content):
        content["windows"] = ArrayRecord({"x": Array(x.numpy())})
        replies.extend(grid.send_and_receive([Message(content, list(grid.get_node_ids())[3], "query.predict")]))

    def inner(message, context, call_next):
        if message.metadata.message_type == "query.predict":
            seen.append(list(message.content))
        return call_next(message, context)

    mods = [client_normalization(Net, NORMS, windows), adaptation(Net, "population"), inner]
    app = server_with_prior(predict, rounds=0)
    simulate(app, message_app(mods, net=Net), 4)
    (reply,) = replies
    prior = population_prior_of_users(source(app.arrays), [data(i)[0] for i in range(4)])
    expected, _ = follow_rule(source(app.arrays), x, rule("population"), prior)
    assert torch.equal(torch.from_numpy(reply.content["predictions"]["0"].numpy()), expected)
    assert seen == [["arrays", "windows"]], "the app sees its own records only"


def test_population_prior_names_a_client_that_cannot_measure():
    with pytest.raises(UserError, match=r"does not measure .*mods=\[normalization\(..., calibration=...\)\]"):
        simulate(server_with_prior(rounds=0), message_app([client_normalization(Net, NORMS)], net=Net))
    short = message_app([client_normalization(Net, NORMS, lambda context: data(0)[0][:1])], net=Net)
    with pytest.raises(UserError, match="at least two users with two windows each"):
        simulate(server_with_prior(rounds=0), short)
    broken = message_app([client_normalization(Net, NORMS, lambda context: data(0)[0] / 0)], net=Net)
    with pytest.raises(UserError, match="not finite: remove windows with NaN"):
        simulate(server_with_prior(rounds=0), broken)
