"""A very small CNN for small images, for first steps and tests."""

from __future__ import annotations

from torch import Tensor, nn

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
        self.require_shape(len(shape) == 3, "images [channels, height, width]", shape)

        def block(in_channels: int, width: int) -> list[nn.Module]:
            return [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

        self.features = nn.Sequential(*block(shape[0], 8), nn.MaxPool2d(2), *block(8, 16), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.features(x).flatten(1))
