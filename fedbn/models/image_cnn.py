"""A 2-D CNN that finds patterns anywhere in an image."""

from __future__ import annotations

from torch import Tensor, nn

from fedbn.models.base import Network


class ImageCNN(Network):
    """Three 3x3 convolutions with BN and ReLU, the first two with pooling; then the maximum over all positions.

    The maximum keeps a pattern that occurs once, which a mean over positions would dilute.

    >>> import torch
    >>> ImageCNN((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    name = "image-cnn"
    about = "2-D CNN for several objects, 3 blocks with BN (16-32-64)"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        fits = len(shape) == 3 and min(shape[1:]) >= 4
        self.require_shape(fits, "images [channels, height >= 4, width >= 4]", shape)

        def block(in_channels: int, width: int) -> list[nn.Module]:
            return [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

        self.features = nn.Sequential(
            *block(shape[0], 16),
            nn.MaxPool2d(2),
            *block(16, 32),
            nn.MaxPool2d(2),
            *block(32, 64),
            nn.AdaptiveMaxPool2d(1),
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.features(x).flatten(1))
