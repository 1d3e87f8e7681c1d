"""A small U-Net with BN for segmentation (after Ronneberger, Fischer, Brox, 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedbn.models.base import Network


class UNet(Network):
    """Two levels down and up (8, 16, 32 channels), with skip connections; two 3x3 convolutions with BN per level.

    Ronneberger, Fischer, Brox, *U-Net: Convolutional Networks for Biomedical Image Segmentation*, MICCAI 2015,
    https://arxiv.org/abs/1505.04597. Unlike theirs, convolutions are padded, so that the output has the size of the
    input, and followed by BN.

    >>> UNet((1, 28, 28), 2)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 2, 28, 28])
    """

    name = "unet"
    about = "small U-Net with BN (8-16-32 channels), for segmentation"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        fits = len(shape) == 3 and all(side % 4 == 0 for side in shape[1:])
        self.require_shape(fits, "images [channels, height, width] with sides divisible by 4", shape)

        def block(in_channels: int, width: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (in_channels, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            return nn.Sequential(*layers)

        self.pool = nn.MaxPool2d(2)
        self.encoder1, self.encoder2, self.bottom = block(shape[0], 8), block(8, 16), block(16, 32)
        self.up2, self.decoder2 = nn.ConvTranspose2d(32, 16, 2, stride=2), block(32, 16)
        self.up1, self.decoder1 = nn.ConvTranspose2d(16, 8, 2, stride=2), block(16, 8)
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes, height, width]`` of images ``[N, channels, height, width]``."""
        first = self.encoder1(x)
        second = self.encoder2(self.pool(first))
        h = self.bottom(self.pool(second))
        h = self.decoder2(torch.cat([second, self.up2(h)], 1))
        h = self.decoder1(torch.cat([first, self.up1(h)], 1))
        return self.classifier(h)
