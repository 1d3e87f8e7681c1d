"""Stacked layers: K clients at once, with their activations concatenated on the channel axis.

`STACKED_LAYERS` holds the layer types of `fedbn.stacked.program`; `fedbn.stacked.functions` holds its functions.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.nn.batchnorm import AnyBatchNorm, AnyInstanceNorm
from fedbn.nn.roles import State
from fedbn.norms.feature_norm import FeatureNormLinear, normalize_features


class Unstackable(Exception):
    """A model or training procedure without a stacked implementation; the message gives the reason."""


@dataclass(frozen=True)
class StackContext:
    """Inputs of a stacked layer or function besides the activations.

    Attributes:
        k: number of clients.
        tensors: parameters and buffers of the layer by local name, in the layout of `GraphProgram.lay_out`.
        noise: one generator per client, for dropout.
        batch_last: whether activations are ``[K, C, B]``.
        lr: if given, the backward pass updates the layer's weight with this learning rate (`_FusedLinearStep`).
    """

    k: int
    tensors: State
    noise: Sequence[torch.Generator | None]
    batch_last: bool = False
    lr: float | None = None


StackedLayer = Callable[[Any, StackContext, Tensor], Tensor]
"""Computes a layer for all clients: (module, context, ``[B, K*C, *positions]``) -> the same kind of shape."""


def as_image(x: Tensor) -> Tensor:
    """View signals ``[B, C, L]`` as images of height one; return anything else unchanged.

    The values are the same. Channels-last kernels exist only for images and are much faster on a CPU.
    """
    return x.unsqueeze(2) if x.dim() == 3 else x


def _channels_last(x: Tensor) -> Tensor:
    if x.dim() != 4:
        return x
    height, width = x.shape[2:]
    if x.shape[1] == 1:  # both formats are the same; the strides tell the kernels which to use for their output
        return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))
    return x.contiguous(memory_format=torch.channels_last)


def mkldnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for large weights, without a gradient, computed by oneDNN if available.

    MKL, which ``F.linear`` uses, does not use AVX-512 on processors of other vendors and takes up to twice as long.
    ``torch.compile`` replaces ``F.linear`` by the same operator.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if pointwise is not None:
            return cast(Tensor, pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


@cache
def is_intel() -> bool:
    """Whether the processor is made by Intel.

    On Intel's processors, MKL computes the input gradient of a large layer in 70 % of oneDNN's time, on an AMD EPYC in
    140 %. The vendor decides, and not a measurement, so the rounding does not depend on timing.
    """
    with suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    return "GenuineIntel" in platform.processor()


UPDATE_BLOCK = 2**18
"""Number of weights that a fused step in bfloat16 updates at once, so that their gradients stay in the cache."""


class _FusedLinearStep(torch.autograd.Function):
    """A linear layer whose backward pass applies the plain SGD step to its weight.

    The gradient is added to the weight directly. Writing a large gradient to memory and reading it back would cost a
    quarter of the whole step, and half of it under autocast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lr: float) -> Tensor:
        ctx.weight, ctx.lr = weight, lr  # not saved for backward: autograd rejects tensors that change in place
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        ctx.save_for_backward(x)
        ctx.multiplied = weight
        return mkldnn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        (g,), (x,), weight = gradients, ctx.saved_tensors, ctx.weight
        multiply = F.linear if is_intel() else mkldnn_linear
        input_gradient = multiply(g, ctx.multiplied.T, None) if ctx.needs_input_grad[0] else None
        if x.dtype == weight.dtype:
            weight.addmm_(g.T, x, alpha=-ctx.lr)
        else:
            rows = max(1, UPDATE_BLOCK // weight.shape[1])
            for part, own in zip(weight.split(rows), g.T.split(rows), strict=True):
                part.add_(own @ x, alpha=-ctx.lr)
        return input_gradient, None, g.sum(0), None


def _linear(m: nn.Linear, context: StackContext, x: Tensor) -> Tensor:
    weight, bias = context.tensors["weight"], context.tensors.get("bias")
    if context.batch_last:
        return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.mT, weight, x)
    if x.dim() != 2:
        raise Unstackable(f"a linear layer on activations with {x.dim()} axes")
    if context.lr is not None:
        return cast(Tensor, _FusedLinearStep.apply(x, weight[0], cast(Tensor, bias).view(-1), context.lr))  # type: ignore[no-untyped-call]
    if context.k == 1:
        return F.linear(x, weight[0], None if bias is None else bias.view(-1))
    rows = x.view(len(x), context.k, -1).transpose(0, 1)
    out = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias, rows, weight.mT)
    return out.transpose(0, 1).flatten(1)


def _feature_norm_linear(m: FeatureNormLinear, context: StackContext, x: Tensor) -> Tensor:
    return _linear(m, context, normalize_features(unstack(context, x)).flatten(1))


def _convolution(m: Any, context: StackContext, x: Tensor) -> Tensor:
    weight, bias = context.tensors["weight"], context.tensors.get("bias")
    if x.dim() == 5:
        return F.conv3d(x, weight, bias, m.stride, m.padding, m.dilation, m.groups * context.k)
    stride, padding, dilation = m.stride, m.padding, m.dilation
    if isinstance(m, nn.Conv1d):
        weight, stride, dilation = weight.unsqueeze(2), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    return F.conv2d(_channels_last(x), weight, bias, stride, padding, dilation, m.groups * context.k)


def _transposed_convolution(m: Any, context: StackContext, x: Tensor) -> Tensor:
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    weight, bias, groups = context.tensors["weight"], context.tensors.get("bias"), m.groups * context.k
    return transposed(x, weight, bias, m.stride, m.padding, m.output_padding, groups, m.dilation)


def batch_norm(m: Any, context: StackContext, x: Tensor) -> Tensor:
    """K batch normalizations as one, because statistics are per channel."""
    t = context.tensors
    mean, variance, batch = select_statistics(m, t)
    rows = x.reshape(1, -1, x.shape[2]) if context.batch_last else x
    out = F.batch_norm(rows, mean, variance, t.get("weight"), t.get("bias"), batch, m.momentum, m.eps)
    return out.view(x.shape) if context.batch_last else out


def select_statistics(m: Any, tensors: State) -> tuple[Tensor | None, Tensor | None, bool]:
    """Running mean and variance of a batch normalization, if it uses them, and whether it normalizes by the batch.

    In training, the batch is counted.
    """
    if m.training and m.track_running_stats:
        tensors["num_batches_tracked"].add_(1)
    batch = m.training or m.running_mean is None
    if m.training and not m.track_running_stats:
        return None, None, batch
    return tensors.get("running_mean"), tensors.get("running_var"), batch


def _instance_norm(m: Any, context: StackContext, x: Tensor) -> Tensor:
    t = context.tensors
    batch = m.training or not m.track_running_stats
    return F.instance_norm(
        x, t.get("running_mean"), t.get("running_var"), t.get("weight"), t.get("bias"), batch, m.momentum, m.eps
    )


def _group_norm(m: nn.GroupNorm, context: StackContext, x: Tensor) -> Tensor:
    return F.group_norm(x, m.num_groups * context.k, context.tensors.get("weight"), context.tensors.get("bias"), m.eps)


def _layer_norm(m: nn.LayerNorm, context: StackContext, x: Tensor) -> Tensor:
    each = x.reshape(len(x), context.k, -1, *x.shape[2:])
    out = F.layer_norm(each, m.normalized_shape, eps=m.eps)
    shape = (context.k, *[1] * (each.dim() - 2 - len(m.normalized_shape)), *m.normalized_shape)
    if "weight" in context.tensors:
        out = out * context.tensors["weight"].view(shape)
    if "bias" in context.tensors:
        out = out + context.tensors["bias"].view(shape)
    return out.flatten(1, 2)


def dropout(m: Any, context: StackContext, x: Tensor) -> Tensor:
    """Dropout with the masks that each client would draw when trained alone."""
    return apply_dropout(context, x, m.p, m.training, whole_channels=type(m) is not nn.Dropout)


def apply_dropout(context: StackContext, x: Tensor, p: float, training: bool, whole_channels: bool = False) -> Tensor:
    """Zero elements, or whole channels, with probability ``p``; each client has its own generator."""
    if not training or p == 0:
        return x
    if context.batch_last:
        return x * dropout_mask(context, x, p)
    if p == 1:
        return x * 0
    shape = (len(x), x.shape[1] // context.k, *([1] * (x.dim() - 2) if whole_channels else x.shape[2:]))
    masks = [x.new_empty(shape).bernoulli_(1 - p, generator=draw) for draw in context.noise]
    return x * torch.stack(masks, 1).div_(1 - p).flatten(1, 2)


def dropout_mask(context: StackContext, x: Tensor, p: float) -> Tensor:
    """Factors ``[K, C, B]`` of a dropout of features."""
    if p == 1:
        return torch.zeros_like(x)
    masks = [x.new_empty(x.shape[2], x.shape[1]).bernoulli_(1 - p, generator=draw) for draw in context.noise]
    return torch.stack(masks).mT.div(1 - p)


def _apply(m: nn.Module, context: StackContext, x: Tensor) -> Tensor:
    return cast(Tensor, m(x))


def _apply_to_positions(m: nn.Module, context: StackContext, x: Tensor) -> Tensor:
    """A layer that computes each channel, or each group of successive channels, by itself."""
    if x.dim() < 3:
        raise Unstackable(f"{type(m).__name__} on activations without positions")
    return cast(Tensor, m(x))


def _softmax(m: Any, context: StackContext, x: Tensor) -> Tensor:
    if m.dim is None or m.dim % x.dim() == 0:
        raise Unstackable(f"{type(m).__name__} without a dim, or along the batch")
    function = torch.softmax if isinstance(m, nn.Softmax) else torch.log_softmax
    return restack(function(unstack(context, x), m.dim % x.dim() + 1))


def _pool(m: nn.Module, context: StackContext, x: Tensor) -> Tensor:
    """Pooling of images, or of signals as images of height one."""
    if isinstance(m, nn.AdaptiveAvgPool1d | nn.AdaptiveMaxPool1d):
        adaptive = F.adaptive_avg_pool2d if isinstance(m, nn.AdaptiveAvgPool1d) else F.adaptive_max_pool2d
        length = m.output_size[0] if isinstance(m.output_size, tuple) else m.output_size
        return cast(Tensor, adaptive(x, (1, cast(int, length))))
    if not isinstance(m, nn.MaxPool1d | nn.AvgPool1d):
        return cast(Tensor, m(x))

    def pair(value: Any, first: int) -> tuple[int, int]:
        return first, value[0] if isinstance(value, tuple) else value

    size, stride, padding = pair(m.kernel_size, 1), pair(m.stride, 1), pair(m.padding, 0)
    if isinstance(m, nn.AvgPool1d):
        return F.avg_pool2d(x, size, stride, padding, m.ceil_mode, m.count_include_pad)
    return F.max_pool2d(x, size, stride, padding, pair(m.dilation, 1), m.ceil_mode)


def flatten(context: StackContext, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Flatten axes other than the batch."""
    first, last = start_dim % x.dim(), end_dim % x.dim()
    if first == 0:
        raise Unstackable("flatten merges the rows of a batch")
    if (first, last) == (1, x.dim() - 1):
        return x.flatten(1)
    return restack(unstack(context, x).flatten(first + 1, last + 1))


def unstack(context: StackContext, x: Tensor) -> Tensor:
    """View activations as ``[B, K, C, *positions]``."""
    return x.unflatten(1, (context.k, -1))


def restack(x: Tensor) -> Tensor:
    """The inverse of `unstack`."""
    if x.dim() < 3:
        raise Unstackable("activations have one value per row")
    return x.flatten(1, 2)


_ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
)
_POSITIONS = (
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
_POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)

STACKED_LAYERS: dict[type[nn.Module], StackedLayer] = {
    nn.Flatten: lambda m, context, x: flatten(context, x, m.start_dim, m.end_dim),
    nn.Linear: _linear,
    FeatureNormLinear: _feature_norm_linear,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, AnyBatchNorm), batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, AnyInstanceNorm), _instance_norm),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), dropout),
    **dict.fromkeys(_ELEMENTWISE, _apply),
    **dict.fromkeys(_POOLING, _pool),
    **dict.fromkeys(_POSITIONS, _apply_to_positions),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _softmax),
}

IMAGE_LAYERS: set[StackedLayer] = {_convolution, batch_norm, _group_norm, _instance_norm, _apply, _pool}
"""Layers with the same result on signals and on images of height one."""

LINEAR_LAYERS = (nn.Linear, FeatureNormLinear)
"""Layers whose weight is ``[K, outputs, inputs]``."""

FEATURE_LAYERS = (nn.Linear, nn.BatchNorm1d, AnyBatchNorm, nn.Dropout, *_ELEMENTWISE)
"""Layers that also work on activations ``[K, C, B]``."""

VIEW_LAYERS = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Layers whose output can share the memory of their input."""
