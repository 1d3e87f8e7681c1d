r"""Inference example weighing (Summers, Dinneen, ICLR 2020, https://arxiv.org/abs/1906.03548).

Evaluation gives the sample at hand a weight :math:`w` in first and second moments,

.. math:: E[x] = (1-w)\,\mathrm{EMA}_x + w\,m_i,\qquad E[x^2] = (1-w)\,\mathrm{EMA}_{x^2} + w\,\overline{x_i^2},

which is EvalNorm's estimator with :math:`a = b = w` on the total variance :math:`\mathrm{EMA}_{x^2}-\mathrm{EMA}_x^2`.
The weight is to be chosen on held-out data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange
from fedbn.norms.evalnorm import instance_statistics
from fedbn.norms.statnorm import along, batch_statistics, blend


class ExampleWeighing(AnyBatchNorm):
    r"""BN in training, with averaged second moments; each sample of ``[N, C, *positions]`` weighs ``w`` in evaluation.

    ``running_var`` holds :math:`\mathrm{EMA}_{x^2}-\mathrm{EMA}_x^2`.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running moments.
        affine: whether there are a scale and a shift.
        w: weight of the sample in evaluation.

    >>> ExampleWeighing(1, w=1.0).eval()(torch.tensor([[[5.0, 7.0]]])).round(decimals=3).tolist()
    [[[-1.0, 1.0]]]
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        *,
        w: float = 0.0,
    ) -> None:
        if not 0 <= w <= 1:
            raise UserError(f"example weighing needs a weight from 0 to 1, not w={w}")
        super().__init__(num_features, eps, momentum, affine)
        self.weight_of_batch, self.w = momentum, w

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        self._check_input_dim(input)
        if self.training:
            self.num_batches_tracked += 1
            with torch.no_grad():
                now, old = batch_statistics(input), (self.running_mean, self.running_var)
                mean, var = blend(*old, now[0].to(old[0]), now[1].to(old[1]), self.weight_of_batch)
                self.running_mean.copy_(mean)
                self.running_var.copy_(var)
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var = blend(self.running_mean, self.running_var, *instance_statistics(input), self.w)
        shape = (*mean.shape, *[1] * (input.dim() - 2))
        out = (input - mean.view(shape)) * torch.rsqrt(var.view(shape) + self.eps)
        return out if self.weight is None else out * along(self.weight, input) + along(self.bias, input)


def convert(model: nn.Module, *, w: float = 0.0, momentum: float = 0.01) -> nn.Module:
    """Example weighing for every normalization layer.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)), w=0.1)[0].w
    0.1
    """
    return exchange(model, ExampleWeighing, "iew", w=w, momentum=momentum)
