"""A very small CNN for small images, for first steps and tests."""

from __future__ import annotations

from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.models.base import Network


class SmallCNN(Network):
    """Two 3x3 convolutions (8, 16) with BN, average pooling and a classifier.

    >>> import torch
    >>> SmallCNN((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    name = "small-cnn"
    about = "two convolutions with BN (8, 16), for small images"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        if len(shape) != 3:
            raise UserError(f"small-cnn takes images [channels, height, width], not examples of shape {list(shape)}")
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.features(x).flatten(1))
