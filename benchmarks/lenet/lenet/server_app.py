"""ServerApp in the shape of Flower's quickstart; it also writes the time at the end of each round."""

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from lenet.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg."""
    times = [time.time()]

    class Timed(FedAvg):
        def aggregate_evaluate(self, *args: Any) -> Any:
            metrics = super().aggregate_evaluate(*args)
            times.append(time.time())
            return metrics

    Timed(fraction_evaluate=0.5).start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=context.run_config["num-server-rounds"]
    )
    Path(str(context.run_config["out"])).write_text(json.dumps(times))
