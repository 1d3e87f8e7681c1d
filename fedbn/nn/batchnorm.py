"""Batch and instance normalization layers for inputs with any number of position axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedbn.errors import UserError


def along(values: Tensor, x: Tensor) -> Tensor:
    """Reshape ``values`` ``[C]`` so that they broadcast against ``x`` ``[N, C, *positions]``."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


class AnyInstanceNorm(_InstanceNorm):
    """Instance normalization of ``[N, C, *positions]`` with any number of position axes.

    Inputs without positions (``[N, C]``) are rejected: a sample has only one value per channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if input.dim() < 3:
            raise UserError(
                f"instance normalization needs [N, C, positions], got {list(input.shape)}: this model normalizes "
                "after a linear layer; choose groupnorm or layernorm"
            )
        return self._apply_instance_norm(input)


class AnyBatchNorm(_BatchNorm):
    """Batch normalization of ``[N, C, *positions]`` with any number of position axes.

    A subclass that computes each channel by itself declares it with ``channelwise = True``. Then K clients train as one
    layer with K*C channels (`fedbn.stacked`), whose buffers of one value have K values; `per_channel` reads them.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, *positions], got {list(input.shape)}")

    def per_channel(self, function: Callable[..., float], *buffers: Tensor) -> float | Tensor:
        """A function of buffers of one value: a number, or with the buffers of K clients a value for each channel.

        >>> layer = AnyBatchNorm(4)
        >>> layer.per_channel(lambda n: n + 1, torch.tensor(2)), layer.per_channel(float, torch.tensor([2, 5]))
        (3, tensor([2., 2., 5., 5.]))
        """
        if buffers[0].dim() == 0:
            return function(*(b.item() for b in buffers))
        values = [function(*own) for own in zip(*(b.tolist() for b in buffers), strict=True)]
        return self.running_mean.new_tensor(values).repeat_interleave(len(self.running_mean) // len(values))

    def scale_and_shift(self, normalized: Tensor) -> Tensor:
        """Apply ``weight`` and ``bias``, if there are any, to normalized activations ``[N, C, *positions]``."""
        if self.weight is None:
            return normalized
        return normalized * along(self.weight, normalized) + along(self.bias, normalized)

    def normalize_instances(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalize each sample of ``x`` ``[N, C, *positions]`` by its own ``mean`` and ``var`` ``[N, C]``."""
        shape = (*mean.shape, *[1] * (x.dim() - 2))
        return self.scale_and_shift((x - mean.view(shape)) * torch.rsqrt(var.view(shape) + self.eps))
