"""The ClientApp of many runs in one simulation: each message names its run, and each run has a state of its own."""

from __future__ import annotations

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from clients.app import app as real

NAME = "which"


class OneOfMany(ClientApp):
    def __call__(self, message, context):
        run = message.content.pop(NAME)["run"]
        state = RecordDict({key.removeprefix(run): r for key, r in context.state.items() if key.startswith(run)})
        reply = real(message, Context(context.run_id, context.node_id, context.node_config, state, {"run": run}))
        for key, record in state.items():
            context.state[run + key] = record
        return reply


app = OneOfMany()
