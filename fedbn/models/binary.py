r"""Networks with binary weights and activations (Sari, Belbahri, Partovi Nia, 2019, https://arxiv.org/abs/1909.09139).

A layer computes :math:`s = \mathrm{sign}(W)\,h` with :math:`h = \mathrm{sign}(\hat s)` of the previous layer. With
fan-in :math:`K` and random signs :math:`s \sim N(0, K)`. The straight-through estimator passes a gradient where
:math:`|\hat s| \le 1`; without normalization this holds for a share :math:`\sqrt{2/(\pi K)}` of the units, and each
passed gradient is a sum of :math:`K` terms. So the root mean square grows towards the input by

.. math:: (2K/\pi)^{1/4}

per layer: gradients *explode*. Divided by the standard deviation of :math:`s`, 68.3 % of the units pass and the fan-in
cancels: the factor is :math:`\sqrt{0.683} = 0.826` at any width. (Derived here; `fedbn.nn.probes` measures it.)
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.errors import unknown
from fedbn.models.base import Network
from fedbn.nn.batchnorm import AnyBatchNorm, along

BinaryNorm = Literal["none", "center", "scale", "fixed", "bn"]
BINARY_NORMS: tuple[BinaryNorm, ...] = ("none", "center", "scale", "fixed", "bn")


class _Sign(torch.autograd.Function):
    """Sign with sign(0) = +1; the gradient passes unchanged where ``|x| <= 1``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


def sign(x: Tensor) -> Tensor:
    """Signs of ``x``, in the same shape, with the straight-through gradient of the hard tanh.

    Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, 2016, https://arxiv.org/abs/1602.02830

    >>> x = torch.tensor([-2.0, -0.5, 0.0, 1.5], requires_grad=True)
    >>> y = sign(x); y.sum().backward(); y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    """
    return _Sign.apply(x)


def _signs(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Signs of a layer's latent weights, which training clips to [-1, 1] so that gradients pass."""
    if layer.training:
        # Clip .data: autograd must not register a change of a weight that a graph has saved.
        layer.weight.data.clamp_(-1, 1)
    return sign(layer.weight)


class BinaryLinear(nn.Linear):
    """Linear layer without bias that uses the signs of its latent weights.

    >>> BinaryLinear(3, 2)(torch.ones(1, 3)).abs().max() <= 3
    tensor(True)
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.uniform_(self.weight, -1, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Integer-valued sums ``[N, outputs]`` if the input ``[N, inputs]`` holds signs."""
        return F.linear(input, _signs(self))


class BinaryConv2d(nn.Conv2d):
    """Padded 3x3 convolution without bias that uses the signs of its latent weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        nn.init.uniform_(self.weight, -1, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Sums ``[N, outputs, height, width]``."""
        return F.conv2d(input, _signs(self), padding=1)


class HalfBatchNorm(AnyBatchNorm):
    """One half of BN: ``center`` only subtracts the mean, ``scale`` only divides by the standard deviation.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> HalfBatchNorm(1, "center")(x).flatten().tolist()
    [-1.0, 1.0]
    """

    def __init__(self, channels: int, part: Literal["center", "scale"]) -> None:
        super().__init__(channels)
        self.part = part

    def forward(self, input: Tensor) -> Tensor:
        """Activations of the input's shape ``[N, C, *positions]``."""
        super().forward(input)  # updates the running statistics
        axes = [0, *range(2, input.dim())]
        if self.part == "center":
            mean = input.mean(axes) if self.training else self.running_mean
            half = input - along(mean, input)
        else:
            variance = input.var(axes, unbiased=False) if self.training else self.running_var
            half = input / along((variance + self.eps).sqrt(), input)
        return along(self.weight, input) * half + along(self.bias, input)


class FixedScale(nn.Module):
    """Division by the square root of the fan-in: the scaling by BN at initialization, without statistics."""

    def __init__(self, fan_in: int) -> None:
        super().__init__()
        self.fan_in = fan_in

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``x / sqrt(fan_in)``."""
        return x / self.fan_in**0.5


def binary_norm(kind: BinaryNorm, channels: int, fan_in: int) -> nn.Module:
    """Layer between the sums of a binary layer and the sign.

    Raises:
        UserError: unknown kind.
    """
    match kind:
        case "none":
            return nn.Identity()
        case "center" | "scale":
            return HalfBatchNorm(channels, kind)
        case "fixed":
            return FixedScale(fan_in)
        case "bn":
            return AnyBatchNorm(channels)
        case _:
            raise unknown("norm of a binary network", str(kind), BINARY_NORMS)


class Sign(nn.Module):
    """`sign` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Signs of ``x``, in the same shape."""
        return sign(x)


class BinaryMLP(Network):
    """Binary hidden layers, each followed by a norm and the sign; the input and the classifier are real-valued.

    Args:
        shape: of an example; flattened.
        classes: number of classes.
        norm: ``none``, ``center`` (only subtract the mean), ``scale`` (only divide by the standard deviation),
            ``fixed`` (divide by the root of the fan-in) or ``bn``.
        width: units per hidden layer.
        depth: number of hidden layers.

    >>> BinaryMLP((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    name = "binary-mlp"
    about = "MLP with 4 binary layers of 128 (signs of weights) and BN"

    def __init__(
        self, shape: tuple[int, ...], classes: int, norm: BinaryNorm = "bn", width: int = 128, depth: int = 4
    ) -> None:
        super().__init__(shape, classes)
        layers: list[nn.Module] = []
        in_features = prod(shape)
        for _ in range(depth):
            layers += [BinaryLinear(in_features, width), binary_norm(norm, width, in_features), Sign()]
            in_features = width
        self.hidden = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.classifier(self.hidden(x.flatten(1)))


class BinaryCNN(Network):
    """Three binary 3x3 convolutions (32, 64, 64) with pooling, norm and sign, and a real-valued classifier.

    Pooling comes before the norm, because the maximum of several signs would nearly always be +1.

    >>> BinaryCNN((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    name = "binary-cnn"
    about = "CNN with 3 binary convolutions (32-64-64) and BN"

    def __init__(self, shape: tuple[int, ...], classes: int, norm: BinaryNorm = "bn") -> None:
        super().__init__(shape, classes)
        self.require_shape(len(shape) == 3 and min(shape[1:]) >= 8, "images [channels, >= 8, >= 8]", shape)
        layers: list[nn.Module] = []
        in_channels = shape[0]
        for width in (32, 64, 64):
            convolution = BinaryConv2d(in_channels, width)
            layers += [convolution, nn.MaxPool2d(2), binary_norm(norm, width, 9 * in_channels), Sign()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(64 * (shape[1] // 8) * (shape[2] // 8), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, height, width]``."""
        return self.classifier(self.features(x).flatten(1))
