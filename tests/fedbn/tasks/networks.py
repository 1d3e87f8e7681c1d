"""Networks with an output per position."""

from __future__ import annotations

from torch import nn


def maps(shape, classes):
    """Logits ``[N, classes, H, W]`` for images."""
    first = nn.Conv2d(shape[0], 12, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, classes, 1))


def sequences(shape, classes):
    """Logits ``[N, classes, T]`` for sequences."""
    first = nn.Conv1d(shape[0], 12, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, classes, 1))
