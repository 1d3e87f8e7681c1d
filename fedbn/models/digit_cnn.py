"""The CNN of FedBN's digit experiments (Li et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedbn.models.base import Network


class DigitCNN(Network):
    """Three 5x5 convolutions (64, 64, 128) and two hidden linear layers (2048, 512), BN after each.

    https://arxiv.org/abs/2102.07623. For 3 x 28 x 28 images and ten classes it has 14,219,210 parameters.

    >>> sum(p.numel() for p in DigitCNN((3, 28, 28), 10).parameters())
    14219210
    """

    name = "digit-cnn"
    about = "FedBN's digit CNN (14.2 M parameters)"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        self.require_shape(len(shape) == 3 and min(shape[1:]) >= 4, "images [channels, height, width]", shape)
        flat = 128 * (shape[1] // 4) * (shape[2] // 4)

        def block(in_channels: int, width: int) -> list[nn.Module]:
            return [nn.Conv2d(in_channels, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU()]

        self.features = nn.Sequential(
            *block(shape[0], 64), nn.MaxPool2d(2), *block(64, 64), nn.MaxPool2d(2), *block(64, 128)
        )
        self.hidden = nn.Sequential(
            nn.Linear(flat, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 512), nn.BatchNorm1d(512), nn.ReLU()
        )
        self.classifier = nn.Linear(512, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        h = self.features(x.contiguous(memory_format=torch.channels_last))
        return self.classifier(self.hidden(h.flatten(1)))
