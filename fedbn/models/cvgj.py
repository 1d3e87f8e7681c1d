"""The BN networks of Simon, Rodner, Denzler, *ImageNet pre-trained models with batch normalization* (2016).

https://arxiv.org/abs/1612.01452; layers as in the authors' published network definitions. Differences from the usual
networks: a BN layer *on the data* replaces mean subtraction, BN in AlexNet and VGG19 has a scale and shift on the data
only, and there is neither LRN nor dropout. The residual networks use pre-activation.

For images smaller than 64 pixels the stem was designed here: a 3x3 convolution of stride 1, without pooling in the
residual networks. By default the networks have a quarter of the published width, for small images on a CPU;
``width_mult=1`` is the published width. Weights are not included: see `fedbn.integrations.pretrained`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.models.base import Network

SMALL_SIDE = 64
"""Images with a shorter side use the small stem."""


def _uses_small_stem(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the small stem is used; raises `UserError` if ``shape`` is not an image."""
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise UserError(f"{name} takes images [channels, >= 8, >= 8], not examples of shape {list(shape)}")
    return min(shape[1:]) < SMALL_SIDE


def _scaled(width: int, width_mult: float) -> int:
    """Scale a width and round it to an even number, because grouped convolutions have two groups."""
    return max(2, 2 * round(width * width_mult / 2))


def _pooled(length: int, kernel: int) -> int:
    """Length after pooling by two with ``ceil_mode``."""
    return -(-(length - kernel) // 2) + 1


class _Plain(Network):
    """Base of AlexNet and VGG19: BN on the data; convolutions and hidden layers with BN without scale and shift."""

    def _build(self, body: list[nn.Module], flat: int, width: int, inputs: int, classes: int) -> None:
        hidden: list[nn.Module] = []
        for in_features in (flat, width):
            hidden += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width, affine=False), nn.ReLU()]
        self.data = nn.BatchNorm2d(inputs)
        self.features = nn.Sequential(*body)
        self.hidden = nn.Sequential(*hidden)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.hidden(self.features(self.data(x)).flatten(1)))


class AlexNetCvgj(_Plain):
    """AlexNet without LRN and dropout: 5 convolutions and 3 linear layers, 8 BN layers.

    >>> import torch
    >>> with torch.device("meta"):
    ...     net = AlexNetCvgj((3, 227, 227), 1000, width_mult=1)
    >>> sum(p.numel() for p in net.parameters()), net.hidden[0].in_features
    (60955662, 9216)
    """

    name = "alexnet-cvgj"
    about = "AlexNet with BN on data and layers, no dropout, a quarter as wide"

    def __init__(self, shape: tuple[int, ...], classes: int, width_mult: float = 0.25) -> None:
        super().__init__(shape, classes)
        small = _uses_small_stem(self.name, shape)
        height, width = shape[1:] if small else (_strided(shape[1]), _strided(shape[2]))
        # Width, kernel, groups, and the kernel of the following pooling (0: none).
        plan = [(96, 11, 1, 3), (256, 5, 2, 3), (384, 3, 1, 0), (384, 3, 2, 0), (256, 3, 2, 3)]
        body: list[nn.Module] = []
        in_channels = shape[0]
        for i, (channels, kernel, groups, pool) in enumerate(plan):
            channels = _scaled(channels, width_mult)
            if i == 0 and not small:
                conv = nn.Conv2d(in_channels, channels, kernel, stride=4, bias=False)
            else:
                kernel = min(kernel, 3) if small else kernel
                conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            body += [conv, nn.BatchNorm2d(channels, affine=False), nn.ReLU()]
            in_channels = channels
            if pool:
                pool = 2 if small else pool
                body.append(nn.MaxPool2d(pool, 2, ceil_mode=True))
                height, width = _pooled(height, pool), _pooled(width, pool)
        self._build(body, in_channels * height * width, _scaled(4096, width_mult), shape[0], classes)


def _strided(side: int) -> int:
    """Side length after the 11x11 convolution of stride 4."""
    return (side - 11) // 4 + 1


class VGG19Cvgj(_Plain):
    """VGG19 without dropout: 16 convolutions and 3 linear layers, 19 BN layers.

    >>> VGG19Cvgj((3, 224, 224), 10, width_mult=1 / 16).hidden[0].in_features
    1568
    """

    name = "vgg19-cvgj"
    about = "VGG19 with BN on data and layers, no dropout, a quarter as wide"

    def __init__(self, shape: tuple[int, ...], classes: int, width_mult: float = 0.25) -> None:
        super().__init__(shape, classes)
        _uses_small_stem(self.name, shape)
        height, width = shape[1:]
        body: list[nn.Module] = []
        in_channels = shape[0]
        for channels, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            channels = _scaled(channels, width_mult)
            for _ in range(convolutions):
                conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
                nn.init.normal_(conv.weight, std=0.01)
                body += [conv, nn.BatchNorm2d(channels, affine=False), nn.ReLU()]
                in_channels = channels
            body.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            height, width = _pooled(height, 2), _pooled(width, 2)
        self._build(body, in_channels * height * width, _scaled(4096, width_mult), shape[0], classes)


class PreActUnit(nn.Module):
    """Convolutions, each preceded by BN and ReLU, with a skip connection that is expanded where shapes change.

    The input of the 1x1 expansion is the pre-activated tensor. The stride of the first convolution is our
    interpretation.

    Args:
        in_channels: channels of the input.
        widths: output channels of each convolution.
        kernels: kernel size of each convolution.
        stride: stride of the first convolution and the expansion.
        leading: BN and ReLU before the first convolution; the input of the first unit is already activated.
    """

    def __init__(
        self, in_channels: int, widths: tuple[int, ...], kernels: tuple[int, ...], stride: int, leading: bool
    ) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU()) if leading else nn.Identity()
        body: list[nn.Module] = []
        channels = in_channels
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            if i:
                body += [nn.BatchNorm2d(channels), nn.ReLU()]
            body.append(nn.Conv2d(channels, width, kernel, 1 if i else stride, kernel // 2, bias=False))
            channels = width
        self.body = nn.Sequential(*body)
        self.expand = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False) if stride > 1 or in_channels != channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the skip connection and the body, ``[N, widths[-1], height / stride, width / stride]``."""
        h = self.activate(x)
        return self.body(h) + (x if self.expand is None else self.expand(h))


class _PreActResNet(Network):
    """BN on the data, stem, four stages of `PreActUnit`, BN, ReLU, average pooling, classifier."""

    units: ClassVar[tuple[int, ...]]
    bottleneck: ClassVar[bool]

    def __init__(self, shape: tuple[int, ...], classes: int, width_mult: float = 0.25) -> None:
        super().__init__(shape, classes)
        small = _uses_small_stem(self.name, shape)
        in_channels = _scaled(64, width_mult)
        stem = [
            nn.Conv2d(shape[0], in_channels, 3, padding=1, bias=False)
            if small
            else nn.Conv2d(shape[0], in_channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
        ]
        if not small:
            stem.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        self.data = nn.BatchNorm2d(shape[0])
        self.stem = nn.Sequential(*stem)
        stages: list[nn.Module] = []
        for stage, units in enumerate(self.units):
            inner = _scaled(64 * 2**stage, width_mult)
            for unit in range(units):
                widths, kernels = ((inner, inner, 4 * inner), (1, 3, 1)) if self.bottleneck else ((inner,) * 2, (3, 3))
                stride = 2 if stage and not unit else 1
                stages.append(PreActUnit(in_channels, widths, kernels, stride, leading=bool(stage or unit)))
                in_channels = widths[-1]
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.classifier = nn.Linear(in_channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.last(self.stages(self.stem(self.data(x)))).mean((2, 3)))


class ResNet10Cvgj(_PreActResNet):
    """One unit of two 3x3 convolutions per stage: 12 convolutions, 10 BN layers.

    >>> import torch
    >>> ResNet10Cvgj((3, 32, 32), 10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    name = "resnet10-cvgj"
    about = "pre-activation ResNet-10 with BN on the data, a quarter as wide"
    units = (1, 1, 1, 1)
    bottleneck = False


class ResNet50Cvgj(_PreActResNet):
    """3, 4, 6 and 3 bottleneck units (1x1, 3x3, 1x1): 53 convolutions, 50 BN layers.

    >>> sum(isinstance(m, nn.BatchNorm2d) for m in ResNet50Cvgj((3, 32, 32), 10).modules())
    50
    """

    name = "resnet50-cvgj"
    about = "pre-activation ResNet-50 with BN on the data, a quarter as wide"
    units = (3, 4, 6, 3)
    bottleneck = True
