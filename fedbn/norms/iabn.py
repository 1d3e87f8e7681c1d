r"""Instance-aware batch normalization, half of NOTE (Gong et al., NeurIPS 2022, https://arxiv.org/abs/2208.05117).

A sample's own statistics correct the common ones where they differ by more than :math:`k` standard errors over its
:math:`L` positions:

.. math::
    \mu_i = \mu + \psi(m_i-\mu;\,k s_\mu),\quad v_i = v + \psi(w_i - v;\,k s_v),\quad
    \psi(x;t) = \mathrm{sign}(x)\max(|x|-t, 0),

with :math:`s_\mu=\sqrt{(v+\epsilon)/L}`, :math:`s_v=(v+\epsilon)\sqrt{2/(L-1)}` and unbiased variances. As :math:`v_i`
lies between :math:`v` and :math:`w_i`, the published clamp at 0 never acts and is left out. The standard errors hold
for independent positions; within a sensor window they are too small, and the layer drifts to instance normalization.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange
from fedbn.norms.statnorm import along, widened


class IABN(AnyBatchNorm):
    """Instance-aware BN of ``[N, C, *positions]``: corrects the batch's statistics in training, running ones after.

    Without positions (``[N, C]``), or with no more than ``skip``, it is BN.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None: plain mean over all batches.
        affine: whether there are a scale and a shift.
        k: standard errors tolerated; 0 is instance normalization, infinity BN.
        skip: positions up to which a sample has too few to correct anything.

    >>> layer = IABN(1, k=0.0).eval(); x = torch.tensor([[[5.0, 7.0]]])
    >>> [round(y, 2) for y in layer(x).flatten().tolist()]  # unbiased: 1 / sqrt(2)
    [-0.71, 0.71]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        k: float = 4.0,
        skip: int = 1,
    ) -> None:
        if k < 0 or skip < 1:
            raise UserError(f"iabn needs k >= 0 and skip >= 1, not k={k} and skip={skip}")
        super().__init__(num_features, eps, momentum, affine)
        self.k, self.skip = k, skip

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        plain = super().forward(input)  # the running statistics move as in BN
        length = input[0, 0].numel()
        if input.dim() < 3 or length <= self.skip or self.k == math.inf:
            return plain
        input = widened(input)
        if self.training:
            var, mean = torch.var_mean(input.transpose(0, 1).flatten(1), 1)
        else:
            mean, var = self.running_mean, self.running_var
        own_var, own_mean = torch.var_mean(input.flatten(2), 2)
        error_mean = torch.sqrt((var + self.eps) / length)
        error_var = (var + self.eps) * math.sqrt(2 / (length - 1))
        mean = mean + _beyond(own_mean - mean, self.k * error_mean)
        var = var + _beyond(own_var - var, self.k * error_var)
        shape = (*mean.shape, *[1] * (input.dim() - 2))
        out = (input - mean.view(shape)) * torch.rsqrt(var.view(shape) + self.eps)
        return out if self.weight is None else out * along(self.weight, input) + along(self.bias, input)


def _beyond(x: Tensor, threshold: Tensor) -> Tensor:
    return x.sign() * torch.relu(x.abs() - threshold)


def convert(model: nn.Module, *, k: float = 4.0, skip: int = 1) -> nn.Module:
    """Instance-aware BN for every normalization layer; published numbers need a network trained with it.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)), k=2.0)[0].k
    2.0
    """
    return exchange(model, IABN, "iabn", k=k, skip=skip)
