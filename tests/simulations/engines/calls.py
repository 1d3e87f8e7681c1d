"""Calls of small clients in a simulation."""

from __future__ import annotations

import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbn_simulations.engines.simulation import run_simulation


def simulate(client, *args, kind="query", rounds=1, timeout=None, **options):
    """Send one message per round to every node; returns the error or the value ``x`` of every reply, by round."""
    app, server, found = ClientApp(), ServerApp(), []
    getattr(app, kind)()(client)

    @server.main()
    def main(grid, context):
        for _ in range(rounds):
            messages = [Message(RecordDict(), node, kind) for node in grid.get_node_ids()]
            replies = grid.send_and_receive(messages, timeout=timeout)
            found.append([r.error.reason if r.has_error() else r.content["x"]["x"] for r in replies])

    run_simulation(server, app, *args, **options)
    return found


def reply(message, value):
    return Message(RecordDict({"x": ConfigRecord({"x": value})}), reply_to=message)


def slow_second(message, context):
    if context.node_config["partition-id"] == 1:
        time.sleep(5)
    return reply(message, 0)
