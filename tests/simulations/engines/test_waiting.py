"""A server that waits for more nodes than there are ends with one sentence."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.strategy import FedAvg as FormerFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, strategy_utils

from fedbn.errors import UserError
from fedbn_simulations.engines import waiting
from fedbn_simulations.engines.simulation import run_simulation
from tests.simulations.engines.calls import reply

TOO_FEW = "waits for more than the 2 nodes of this simulation: raise --num-supernodes"


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(waiting, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: threading.Event().wait(0.02))


def test_strategy_that_needs_more_nodes_ends(fast):
    def server(grid, context):
        strategy = FedAvg(min_available_nodes=3)
        strategy.start(grid, ArrayRecord([np.ones(1)]), num_rounds=1)

    with pytest.raises(UserError, match=TOO_FEW):
        run_simulation(server, ClientApp(), 2)


def test_server_of_the_former_interface_that_needs_more_nodes_ends_at_once():
    before = SimpleClientManager.wait_for

    def server_fn(context):
        parameters = ndarrays_to_parameters([np.ones(1)])
        strategy = FormerFedAvg(min_available_clients=3, initial_parameters=parameters)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    with pytest.raises(UserError, match=TOO_FEW):
        run_simulation(ServerApp(server_fn=server_fn), ClientApp(), 2)
    assert SimpleClientManager.wait_for is before


def test_server_that_asks_often_between_messages_does_not_wait(fast):
    app, found = ClientApp(), []

    @app.query()
    def query(message, context):
        return reply(message, 1)

    def server(grid, context):
        for _ in range(20):
            (node, _other) = grid.get_node_ids()
            found.extend(grid.send_and_receive([Message(RecordDict(), node, "query")]))
            threading.Event().wait(0.01)

    run_simulation(server, app, 2)
    assert len(found) == 20
