"""Scans of bright squares by four scanners, as a Dataset of PyTorch, and a small U-Net."""

import torch
from torch import nn
from torch.utils.data import Dataset


class Scans(Dataset):
    """Images of a scanner with its own contrast and brightness, and masks of their lesions."""

    def __init__(self, scanner, rows, seed=0):
        draw = torch.Generator().manual_seed(100 * scanner + seed)
        self.masks = torch.zeros(rows, 8, 8, dtype=torch.int64)
        for mask, (i, j) in zip(self.masks, torch.randint(0, 5, (rows, 2), generator=draw), strict=True):
            mask[i : i + 4, j : j + 4] = 1
        self.images = (2 * self.masks + torch.randn(rows, 8, 8, generator=draw))[:, None] * (1 + scanner) + 3 * scanner

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.masks[i]


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
