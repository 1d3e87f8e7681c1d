"""The ServerApp of many runs in one simulation: what starts Flower and Ray is paid once."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import ServerApp

from simulations.app import app as real
from tests.integration.ray_client import NAME

RUNS = "runs.json"


class OneOfMany:
    """The grid as one run sees it."""

    def __init__(self, grid, run):
        self.grid, self.run = grid, run

    def get_node_ids(self):
        return self.grid.get_node_ids()

    def send_and_receive(self, messages, timeout=None):
        for message in messages:
            message.content[NAME] = ConfigRecord({"run": self.run})
        return self.grid.send_and_receive(messages, timeout=timeout)


app = ServerApp()


@app.main()
def main(grid, context):
    place = Path(context.run_config["out"]).parent
    for name, run in json.loads((place / RUNS).read_text()).items():
        config = {"run": run, "out": str(place / f"{name}.safetensors")}
        one = Context(context.run_id, context.node_id, context.node_config, RecordDict(), config)
        real(OneOfMany(grid, run), one)
