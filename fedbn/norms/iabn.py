r"""Instance-aware batch normalization, one half of NOTE (Gong et al., NeurIPS 2022, https://arxiv.org/abs/2208.05117).

The statistics of a sample over its :math:`L` positions correct the shared ones where the two differ by more than
:math:`k` standard errors:

.. math::
    \mu_i = \mu + \psi(m_i-\mu;\,k s_\mu),\quad v_i = v + \psi(w_i - v;\,k s_v),\quad
    \psi(x;t) = \mathrm{sign}(x)\max(|x|-t, 0),

with :math:`s_\mu=\sqrt{(v+\epsilon)/L}`, :math:`s_v=(v+\epsilon)\sqrt{2/(L-1)}` and unbiased variances. As :math:`v_i`
lies between :math:`v` and :math:`w_i`, the published clamp at 0 has no effect and is left out. The standard errors hold
for independent positions. In a sensor window they are too small, which moves the layer towards instance normalization.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms
from fedbn.norms.statnorm import widened


class IABN(AnyBatchNorm):
    """Instance-aware BN of ``[N, C, *positions]``.

    It corrects the batch statistics in training and the running statistics in evaluation. For inputs without positions
    (``[N, C]``) or with at most ``skip`` positions it is BN.

    Args:
        num_features: channels C.
        k: number of tolerated standard errors; 0 is instance normalization, infinity is BN.
        skip: largest number of positions that is too small for a correction.
        **kwargs: ``eps``, ``momentum`` and ``affine`` as in `torch.nn.BatchNorm1d`.

    >>> layer = IABN(1, k=0.0).eval(); x = torch.tensor([[[5.0, 7.0]]])
    >>> [round(y, 2) for y in layer(x).flatten().tolist()]  # unbiased: 1 / sqrt(2)
    [-0.71, 0.71]
    """

    channelwise = True

    def __init__(self, num_features: int, *, k: float = 4.0, skip: int = 1, **kwargs: Any) -> None:
        if k < 0 or skip < 1:
            raise UserError(f"iabn needs k >= 0 and skip >= 1, not k={k} and skip={skip}")
        super().__init__(num_features, **kwargs)
        self.k, self.skip = k, skip

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        plain = super().forward(input)  # also updates the running statistics as BN does
        length = input[0, 0].numel()
        if input.dim() < 3 or length <= self.skip or self.k == math.inf:
            return plain
        input = widened(input)
        if self.training:
            var, mean = torch.var_mean(input.transpose(0, 1).flatten(1), 1)
        else:
            mean, var = self.running_mean, self.running_var
        sample_var, sample_mean = torch.var_mean(input.flatten(2), 2)
        error_mean = torch.sqrt((var + self.eps) / length)
        error_var = (var + self.eps) * math.sqrt(2 / (length - 1))
        mean = mean + _soft_threshold(sample_mean - mean, self.k * error_mean)
        var = var + _soft_threshold(sample_var - var, self.k * error_var)
        return self.normalize_instances(input, mean, var)


def _soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    return x.sign() * torch.relu(x.abs() - threshold)


convert = partial(convert_norms, cls=IABN, kind="iabn")
"""Replace BN by instance-aware BN. Options: ``k``, ``skip``.

The published numbers need a network trained with it.
"""
