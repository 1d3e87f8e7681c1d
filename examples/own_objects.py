"""Your own Datasets, network and strategy as Python objects. Run it with: python examples/own_objects.py"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedbn
from fedbn.strategies import LOCAL, NormStrategy


def population():
    """Five sensors with a gain and an offset of their own; a training and a test Dataset each."""
    draw = torch.Generator().manual_seed(0)
    users = {}
    for i in range(5):
        y = torch.arange(120) % 3
        x = torch.randn(120, 6, generator=draw) + 2 * nn.functional.one_hot(y, 6)
        x = (0.5 + i) * x + torch.randn(6, generator=draw)
        users[f"sensor{i}"] = TensorDataset(x[:90], y[:90]), TensorDataset(x[90:], y[90:])
    return fedbn.Population.from_datasets(users, unseen=["sensor4"], classes=["rest", "walk", "run"])


class Net(nn.Module):
    """Any network; the arguments `shape` and `classes` are optional."""

    def __init__(self, shape, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(shape[0], 16), nn.BatchNorm1d(16), nn.ReLU())
        self.classifier = nn.Linear(16, classes)

    def forward(self, x):
        return self.classifier(self.features(x))


@dataclass(frozen=True)
class DampedStatistics(NormStrategy):
    """Local scale and shift; the server moves its statistics by a share of the clients' mean."""

    name = "damped-statistics"
    affine = LOCAL
    share: float = 0.5

    def aggregate_statistics(self, updates, weights, keys, old, progress):
        new = super().aggregate_statistics(updates, weights, keys, old, progress)
        return {k: old[k] + self.share * (new[k] - old[k]) for k in keys}


if __name__ == "__main__":
    result = fedbn.compare(
        population(), ["fedavg", "fedbn", DampedStatistics(share=0.8)], model=Net, seeds=[0, 1, 2], rounds=10
    )
    print(result)
    print("best on seen users' own tests:", result.best())
    print(result.model("fedbn", user="sensor0"))
