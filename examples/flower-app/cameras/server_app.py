"""The ServerApp. The wrapper keeps counters as integers and gives local entries their initial values."""

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from cameras.task import Net
from fedbn_simulations.flower.strategies import normalization

app = ServerApp()


@app.main()
def main(grid, context):
    torch.manual_seed(0)
    strategy = normalization(FedAvg(), Net, "fedbn")
    rounds = context.run_config["num-server-rounds"]
    result = strategy.start(grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=rounds)
    print(f"accuracy {result.evaluate_metrics_clientapp[rounds]['accuracy']:.3f}")
