"""Your own Dataset, network, loss, metric, strategy, optimizer and augmentation: python examples/own_everything.py"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import fedbn
from fedbn.strategies import LOCAL, NormStrategy
from fedbn.tasks.segmentation import Segmentation


class Scans(Dataset):  # bright squares on noise; each scanner has its own contrast and brightness
    def __init__(self, scanner, rows, seed):
        draw = torch.Generator().manual_seed(100 * scanner + seed)
        self.masks = torch.zeros(rows, 8, 8, dtype=torch.int64)
        for mask, (i, j) in zip(self.masks, torch.randint(0, 5, (rows, 2), generator=draw), strict=True):
            mask[i : i + 4, j : j + 4] = 1
        self.images = (2 * self.masks + torch.randn(rows, 8, 8, generator=draw))[:, None] * (1 + scanner) + 3 * scanner

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.masks[i]


def scans():
    users = {f"scanner{s}": (Scans(s, 32, 0), Scans(s, 16, 1)) for s in range(4)}
    return fedbn.Population.from_datasets(users, task=Focal(), unseen=["scanner3"], classes=["background", "lesion"])


class UNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.outputs = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        skip = self.down(x)
        return self.outputs(torch.cat([skip, self.up(self.deep(skip))], 1))


@dataclass(frozen=True)
class Focal(Segmentation):
    name = "focal"
    gamma: float = 2.0

    def losses(self, outputs, y):
        p = F.cross_entropy(outputs, y, reduction="none").neg().exp()
        return (-((1 - p) ** self.gamma) * p.log()).flatten(1).mean(1)


def sensitivity(outputs, y):  # share of lesion pixels that are found
    return (outputs.argmax(1)[y == 1] == 1).double().mean()


@dataclass(frozen=True)
class LocalStatistics(NormStrategy):
    name = "local-statistics"
    statistics = LOCAL


def noisy(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


OPTIONS = {
    "model": UNet,
    "task": Focal(gamma=1.5),
    "metric": sensitivity,
    "optimizer": torch.optim.AdamW,
    "augment": noisy,
    "rounds": 6,
    "lr": 0.01,
    "batch_size": 8,
}

if __name__ == "__main__":
    print(fedbn.compare(scans(), ["fedavg", LocalStatistics()], seeds=2, **OPTIONS))
