"""What an app does that follows Flower's how-to for FedBN; docs/flower.md compares it with the mod."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
)
from torch import nn

from fedbn_simulations.engines.simulation import run_simulation


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.last = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.bn1(x))


def run(strategy):
    """BN statistics of client 0 at the start of each round, and the error of its evaluation."""
    client, server, found, errors = ClientApp(), ServerApp(), [], []

    @client.train()
    def train(message, context):
        net = Net()
        state = {k: v for k, v in message.content["arrays"].to_torch_state_dict().items() if "bn" not in k}
        net.load_state_dict(state, strict=False)
        if context.node_config["partition-id"] == 0:
            found.append(net.bn1.running_mean.clone())
        net.train()(torch.ones(4, 3) + torch.randn(4, 3))
        state = {k: v for k, v in net.state_dict().items() if "bn" not in k}
        content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 4})}
        return Message(RecordDict(content), reply_to=message)

    @client.evaluate()
    def evaluation(message, context):  # as in Flower's quickstart, which the how-to does not change
        try:
            Net().load_state_dict(message.content["arrays"].to_torch_state_dict())
        except RuntimeError as error:
            errors.append(str(error))
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 4})}), reply_to=message)

    @server.main()
    def main(grid, context):
        strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=2)

    run_simulation(server, client, 2)
    return found, errors


def test_how_to_of_flower_starts_bn_again_in_every_round_and_its_evaluation_fails():
    found, errors = run(FedAvg())
    assert [mean.tolist() for mean in found] == [[0.0] * 3] * 2
    assert len(errors) == 4
    assert "Missing key(s) in state_dict" in errors[0]


@pytest.mark.parametrize(
    "strategy",
    [
        FedAdam,
        FedYogi,
        lambda: FedAvgM(server_momentum=0.5),
        lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.5, 1.0, 2),
    ],
)
def test_how_to_of_flower_does_not_work_with_server_optimizers_and_dp(strategy):
    with pytest.raises((AggregationError, ValueError)):
        run(strategy())
