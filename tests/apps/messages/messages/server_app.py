import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from messages.task import Net

app = ServerApp()


class InOrder(FedAvg):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, sorted(replies, key=lambda r: r.content["metrics"]["partition"]))


@app.main()
def main(grid, context):
    config = context.run_config
    if config["seeded"]:
        torch.manual_seed(0)
    strategy = (InOrder if config["in-order"] else FedAvg)(fraction_evaluate=config["fraction-evaluate"])
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=config["num-server-rounds"]
    )
    if config["out"]:
        torch.save(result.arrays.to_torch_state_dict(), config["out"])
