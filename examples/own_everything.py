"""Your own Datasets, network, loss, metric, strategy, optimizer and augmentation: python examples/own_everything.py"""

import torch
from scans import Scans, UNet  # a Dataset and a network of PyTorch
from torch.nn.functional import cross_entropy

import fedbn
from fedbn.strategies import LOCAL, NormStrategy
from fedbn.tasks import Segmentation


def users():  # training and test data of each user
    return {f"scanner{s}": (Scans(s, rows=32), Scans(s, rows=16, seed=1)) for s in range(4)}


class Focal(Segmentation):
    def losses(self, outputs, y):
        loss = cross_entropy(outputs, y, reduction="none")
        return ((1 - (-loss).exp()) ** 2 * loss).flatten(1).mean(1)


class LocalStatistics(NormStrategy):
    name, statistics = "local-statistics", LOCAL


def sensitivity(outputs, y):  # share of lesion pixels that are found
    return (outputs.argmax(1)[y == 1] == 1).double().mean()


def noisy(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


OPTIONS = {"model": UNet, "task": Focal, "metric": sensitivity, "optimizer": torch.optim.AdamW, "augment": noisy}
if __name__ == "__main__":
    print(fedbn.compare(users, ["fedavg", LocalStatistics], **OPTIONS, lr=0.01, batch_size=8, rounds=6, seeds=2))
