"""A 1-D CNN for windows of inertial sensors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedbn.models.base import Network


class HarCNN(Network):
    """Three blocks of convolution along time, BN, pooling and ReLU, then average over time and a classifier.

    A subclass with another ``widths`` has other blocks.

    The convolutions run as 2-D convolutions of height 1 in channels-last order. They give the same numbers as
    ``Conv1d`` and are about 1.3 times as fast on a CPU. Pooling before ReLU is exact and halves the work of ReLU.

    Shapes: input ``[N, channels, length]``, output ``[N, classes]``.

    >>> HarCNN((6, 128), 6)(torch.zeros(2, 6, 128)).shape
    torch.Size([2, 6])
    """

    name = "har-cnn"
    about = "1-D CNN for sensor windows, 3 blocks with BN (32-64-64 channels)"
    widths: ClassVar[tuple[int, ...]] = (32, 64, 64)

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        self.require_shape(len(shape) == 2 and shape[1] >= 8, "windows [channels, length >= 8]", shape)
        layers: list[nn.Module] = []
        in_channels = shape[0]
        for width in self.widths:
            convolution = nn.Conv2d(in_channels, width, (1, 5), padding=(0, 2), bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.MaxPool2d((1, 2)), nn.ReLU()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of windows ``[N, channels, length]``."""
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return self.classifier(self.features(x).mean((2, 3)))
