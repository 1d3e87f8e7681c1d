r"""Adaptive instance normalization (Huang, Belongie, ICCV 2017, https://arxiv.org/abs/1703.06868).

Activations take on the mean and standard deviation, sample by sample and channel by channel, of a style,

.. math:: \mathrm{AdaIN}(x, y) = \sigma(y)\,\frac{x-\mu(x)}{\sigma(x)} + \mu(y),

with :math:`\sigma` the root of the unbiased variance over positions plus :math:`10^{-5}`, as in common use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedbn.errors import UserError


def adain(x: Tensor, style: Tensor) -> Tensor:
    """``x`` ``[N, C, *positions]`` with the statistics of ``style`` ``[N or 1, C, *other positions]``.

    Raises:
        UserError: fewer than two positions, which have no standard deviation.

    >>> adain(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[5.0, 9.0]]])).round().tolist()
    [[[5.0, 9.0]]]
    """
    mean, std = _moments(x)
    style_mean, style_std = _moments(style)
    shape = (*mean.shape, *[1] * (x.dim() - 2))
    out = (x - mean.view(shape)) / std.view(shape)
    lead = (*style_mean.shape, *[1] * (x.dim() - 2))
    return out * style_std.view(lead) + style_mean.view(lead)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 3 or x[0, 0].numel() < 2:
        raise UserError(f"AdaIN needs [N, C, positions] with at least two positions, got {list(x.shape)}")
    var, mean = torch.var_mean(x.flatten(2), 2)
    return mean, torch.sqrt(var + 1e-5)
