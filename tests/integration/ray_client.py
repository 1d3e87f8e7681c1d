"""A ClientApp for many runs in one simulation: each message names its run, and each run has its own state."""

from __future__ import annotations

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedbn_clients.app import app as run_app

RUN_RECORD = "which"


class MultiRunClientApp(ClientApp):
    def __call__(self, message, context):
        run = message.content.pop(RUN_RECORD)["run"]
        state = RecordDict({key.removeprefix(run): r for key, r in context.state.items() if key.startswith(run)})
        reply = run_app(message, Context(context.run_id, context.node_id, context.node_config, state, {"run": run}))
        for key, record in state.items():
            context.state[run + key] = record
        return reply


app = MultiRunClientApp()
