"""A ServerApp for many runs in one simulation, so that Flower and Ray start only once."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import ServerApp

from fedbn_simulations.app import app as run_app
from fedbn_simulations.server.safeguards import SIMULATION_CONFIG
from tests.integration.ray_client import RUN_RECORD

RUNS = "runs.json"


class RunGrid:
    """The grid of one run."""

    def __init__(self, grid, run):
        self.grid, self.run = grid, run

    def get_node_ids(self):
        return self.grid.get_node_ids()

    def pull_messages(self, message_ids):
        return self.grid.pull_messages(message_ids)

    def push_messages(self, messages):
        for message in messages:
            message.content[RUN_RECORD] = ConfigRecord({"run": self.run})
        return self.grid.push_messages(messages)

    def send_and_receive(self, messages, timeout=None):
        for message in messages:
            message.content[RUN_RECORD] = ConfigRecord({"run": self.run})
        return self.grid.send_and_receive(messages, timeout=timeout)


app = ServerApp()


@app.main()
def main(grid, context):
    directory = Path(context.run_config["out"]).parent
    for name, run in json.loads((directory / RUNS).read_text()).items():
        config = {"run": run, "out": str(directory / f"{name}.safetensors"), **SIMULATION_CONFIG}
        run_context = Context(context.run_id, context.node_id, context.node_config, RecordDict(), config)
        run_app(RunGrid(grid, run), run_context)
