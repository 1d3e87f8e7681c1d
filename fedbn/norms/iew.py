r"""Inference example weighing (Summers, Dinneen, ICLR 2020, https://arxiv.org/abs/1906.03548).

In evaluation the current sample has a weight :math:`w` in the first and second moments,

.. math:: E[x] = (1-w)\,\mathrm{EMA}_x + w\,m_i,\qquad E[x^2] = (1-w)\,\mathrm{EMA}_{x^2} + w\,\overline{x_i^2},

which is EvalNorm's estimator with :math:`a = b = w` on the total variance :math:`\mathrm{EMA}_{x^2}-\mathrm{EMA}_x^2`.
Choose the weight on held-out data.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms
from fedbn.norms.evalnorm import instance_statistics
from fedbn.norms.statnorm import batch_statistics, blend


class ExampleWeighing(AnyBatchNorm):
    r"""BN of ``[N, C, *positions]`` in training; each sample has weight ``w`` in its own statistics in evaluation.

    Second moments are averaged; ``running_var`` holds :math:`\mathrm{EMA}_{x^2}-\mathrm{EMA}_x^2`.

    Args:
        num_features: channels C.
        momentum: weight of a batch in the running moments.
        w: weight of the sample in evaluation.
        **kwargs: ``eps`` and ``affine`` as in `torch.nn.BatchNorm1d`.

    >>> ExampleWeighing(1, w=1.0).eval()(torch.tensor([[[5.0, 7.0]]])).round(decimals=3).tolist()
    [[[-1.0, 1.0]]]
    """

    def __init__(self, num_features: int, *, momentum: float = 0.01, w: float = 0.0, **kwargs: Any) -> None:
        if not 0 <= w <= 1:
            raise UserError(f"example weighing needs a weight from 0 to 1, not w={w}")
        super().__init__(num_features, momentum=momentum, **kwargs)
        self.batch_weight, self.w = momentum, w

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        self._check_input_dim(input)
        if self.training:
            self.num_batches_tracked += 1
            with torch.no_grad():
                batch_mean, batch_var = (t.to(self.running_mean) for t in batch_statistics(input)[:2])
                mean, var = blend(self.running_mean, self.running_var, batch_mean, batch_var, self.batch_weight)
                self.running_mean.copy_(mean)
                self.running_var.copy_(var)
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var = blend(self.running_mean, self.running_var, *instance_statistics(input), self.w)
        return self.normalize_instances(input, mean, var)


convert = partial(convert_norms, cls=ExampleWeighing, kind="iew", momentum=0.01)
"""Replace BN by example weighing. Options: ``w``, ``momentum``."""
