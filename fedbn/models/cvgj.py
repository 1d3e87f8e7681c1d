"""The BN networks of Simon, Rodner, Denzler, *ImageNet pre-trained models with batch normalization* (2016).

https://arxiv.org/abs/1612.01452; layers as in the authors' published network definitions. What sets them apart: a BN
layer *on the data* stands for mean subtraction, BN in AlexNet and VGG19 has scale and shift on the data only, and
LRN and dropout are gone. The residual networks are of the pre-activation kind.

Where an image is smaller than 64 pixels the stem is ours: a 3x3 convolution of stride 1 and no pooling after it in the
residual networks. Built by name the networks are a quarter as wide as published, which suits small images on a CPU;
``width_mult=1`` is the published width. Weights are not included: see `fedbn.integrations.pretrained`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.models.base import Network

SMALL = 64
"""Images with a side below this get the small stem."""


def _images(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the stem is the small one; raises for what is no image."""
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise UserError(f"{name} takes images [channels, >= 8, >= 8], not examples of shape {list(shape)}")
    return min(shape[1:]) < SMALL


def _scaled(width: int, width_mult: float) -> int:
    """A width scaled and rounded to an even number (grouped convolutions come in two groups)."""
    return max(2, 2 * round(width * width_mult / 2))


def _pooled(length: int, kernel: int) -> int:
    """Length after pooling by two with ``ceil_mode``."""
    return -(-(length - kernel) // 2) + 1


class _Plain(Network):
    """AlexNet and VGG19: convolution, BN without scale and shift, ReLU; two hidden layers; one BN on the data."""

    def _finish(self, body: list[nn.Module], flat: int, width: int, inputs: int, classes: int) -> None:
        hidden: list[nn.Module] = []
        for before in (flat, width):
            hidden += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width, affine=False), nn.ReLU()]
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
        small = _images(self.name, shape)
        height, width = shape[1:] if small else (_strided(shape[1]), _strided(shape[2]))
        # Width, kernel, groups, and the kernel of the pooling that follows (0: none).
        plan = [(96, 11, 1, 3), (256, 5, 2, 3), (384, 3, 1, 0), (384, 3, 2, 0), (256, 3, 2, 3)]
        body: list[nn.Module] = []
        before = shape[0]
        for i, (channels, kernel, groups, pool) in enumerate(plan):
            channels = _scaled(channels, width_mult)
            if i == 0 and not small:
                conv = nn.Conv2d(before, channels, kernel, stride=4, bias=False)
            else:
                kernel = min(kernel, 3) if small else kernel
                conv = nn.Conv2d(before, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            body += [conv, nn.BatchNorm2d(channels, affine=False), nn.ReLU()]
            before = channels
            if pool:
                pool = 2 if small else pool
                body.append(nn.MaxPool2d(pool, 2, ceil_mode=True))
                height, width = _pooled(height, pool), _pooled(width, pool)
        self._finish(body, before * height * width, _scaled(4096, width_mult), shape[0], classes)


def _strided(side: int) -> int:
    """Side of an image after the 11x11 convolution of stride 4."""
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
        _images(self.name, shape)
        height, width = shape[1:]
        body: list[nn.Module] = []
        before = shape[0]
        for channels, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            channels = _scaled(channels, width_mult)
            for _ in range(convolutions):
                conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
                nn.init.normal_(conv.weight, std=0.01)
                body += [conv, nn.BatchNorm2d(channels, affine=False), nn.ReLU()]
                before = channels
            body.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            height, width = _pooled(height, 2), _pooled(width, 2)
        self._finish(body, before * height * width, _scaled(4096, width_mult), shape[0], classes)


class PreActUnit(nn.Module):
    """Convolutions each with BN and ReLU *before* it, and a skip that is expanded where shapes change.

    The 1x1 expansion reads the pre-activated tensor. The stride is the first convolution's, which is our reading.

    Args:
        before: channels of the input.
        widths: output channels of each convolution.
        kernels: their kernels.
        stride: of the first convolution and the expansion.
        leading: BN and ReLU before the first convolution; the net's first unit gets an activated input.
    """

    def __init__(
        self, before: int, widths: tuple[int, ...], kernels: tuple[int, ...], stride: int, leading: bool
    ) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU()) if leading else nn.Identity()
        body: list[nn.Module] = []
        channels = before
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            if i:
                body += [nn.BatchNorm2d(channels), nn.ReLU()]
            step = 1 if i else stride
            body.append(nn.Conv2d(channels, width, kernel, step, kernel // 2, bias=False))
            channels = width
        self.body = nn.Sequential(*body)
        self.expand = nn.Conv2d(before, channels, 1, stride, bias=False) if stride > 1 or before != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Sum of skip and body, ``[N, widths[-1], height / stride, width / stride]``."""
        h = self.activate(x)
        return self.body(h) + (x if self.expand is None else self.expand(h))


class _PreActResNet(Network):
    """BN on the data, stem, four stages of `PreActUnit`, BN, ReLU, average pooling, classifier."""

    units: ClassVar[tuple[int, ...]]
    bottleneck: ClassVar[bool]

    def __init__(self, shape: tuple[int, ...], classes: int, width_mult: float = 0.25) -> None:
        super().__init__(shape, classes)
        small = _images(self.name, shape)
        before = _scaled(64, width_mult)
        stem = [
            nn.Conv2d(shape[0], before, 3, padding=1, bias=False)
            if small
            else nn.Conv2d(shape[0], before, 7, 2, 3, bias=False),
            nn.BatchNorm2d(before),
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
                stages.append(PreActUnit(before, widths, kernels, stride, leading=bool(stage or unit)))
                before = widths[-1]
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.classifier = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.last(self.stages(self.stem(self.data(x)))).mean((2, 3)))


class ResNet10Cvgj(_PreActResNet):
    """One unit of two 3x3 convolutions a stage: 12 convolutions, 10 BN layers.

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
