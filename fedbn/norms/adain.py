r"""Adaptive instance normalization (Huang, Belongie, ICCV 2017, https://arxiv.org/abs/1703.06868).

Activations get the mean and standard deviation of a style, for each sample and channel,

.. math:: \mathrm{AdaIN}(x, y) = \sigma(y)\,\frac{x-\mu(x)}{\sigma(x)} + \mu(y),

where :math:`\sigma` is the square root of the unbiased variance over positions plus :math:`10^{-5}`, as is common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedbn.errors import UserError


def adain(x: Tensor, style: Tensor) -> Tensor:
    """Give ``x`` ``[N, C, *positions]`` the statistics of ``style`` ``[N or 1, C, *other positions]``.

    Raises:
        UserError: there are fewer than two positions, so the standard deviation is undefined.

    >>> adain(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[5.0, 9.0]]])).round().tolist()
    [[[5.0, 9.0]]]
    """
    mean, std = _moments(x)
    style_mean, style_std = _moments(style)
    shape = (*mean.shape, *[1] * (x.dim() - 2))
    out = (x - mean.view(shape)) / std.view(shape)
    style_shape = (*style_mean.shape, *[1] * (x.dim() - 2))
    return out * style_std.view(style_shape) + style_mean.view(style_shape)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 3 or x[0, 0].numel() < 2:
        raise UserError(f"AdaIN needs [N, C, positions] with at least two positions, got {list(x.shape)}")
    var, mean = torch.var_mean(x.flatten(2), 2)
    return mean, torch.sqrt(var + 1e-5)
