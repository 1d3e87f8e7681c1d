"""ResNet-20 for small images (He, Zhang, Ren, Sun, CVPR 2016, section 4.2), with projection shortcuts."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.models.base import Network


class Block(nn.Module):
    """Two 3x3 convolutions with BN and a shortcut with a projection (``downsample``) where shapes change."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Activations ``[N, width, height / stride, width / stride]``."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class ResNet20(Network):
    """Nine residual blocks of widths 16, 32, 64. https://arxiv.org/abs/1512.03385

    >>> import torch
    >>> net = ResNet20((3, 32, 32), 10)
    >>> net(torch.zeros(2, 3, 32, 32)).shape, sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    (torch.Size([2, 10]), 21)
    """

    name = "resnet20"
    about = "ResNet-20 with BN for small images (0.27 M parameters)"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        self.require_shape(len(shape) == 3 and min(shape[1:]) >= 8, "images [channels, >= 8, >= 8]", shape)
        self.conv1 = nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        in_channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(3):
                blocks.append(Block(in_channels, width, 2 if stage > 1 and i == 0 else 1))
                in_channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        h = F.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            h = cast(nn.Module, getattr(self, stage))(h)
        return self.fc(h.mean((2, 3)))
