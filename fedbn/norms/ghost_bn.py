"""Ghost batch normalization (Hoffer, Hubara, Soudry, NeurIPS 2017, https://arxiv.org/abs/1705.08741).

A large batch is normalized in parts, each by its own statistics, which keeps the noise of small batches. Running
statistics are updated by the mean of the parts' statistics, as in Summers and Dinneen, ICLR 2020,
https://arxiv.org/abs/1906.03548.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import convert_norms
from fedbn.norms.statnorm import widened


class GhostBN(AnyBatchNorm):
    """BN over parts of the batch ``[N, C, *positions]`` in training; plain BN in evaluation.

    Args:
        num_features: channels C.
        size: rows per part. The last part is smaller if ``size`` does not divide the batch; a single remaining row is
            added to the part before it.
        **kwargs: ``eps``, ``momentum`` and ``affine`` as in `torch.nn.BatchNorm1d`.

    >>> GhostBN(1, size=2)(torch.tensor([[0.0], [2.0], [5.0], [9.0]])).round(decimals=3).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """

    channelwise = True

    def __init__(self, num_features: int, *, size: int = 16, **kwargs: Any) -> None:
        if size < 1:
            raise UserError(f"ghost batch normalization needs parts of at least one row, not size={size}")
        super().__init__(num_features, **kwargs)
        self.size = size

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        self.num_batches_tracked += 1
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        parts = _parts(widened(input), self.size)
        out = [F.batch_norm(p, None, None, self.weight, self.bias, True, 0.0, self.eps) for p in parts]
        with torch.no_grad():
            statistics = [torch.var_mean(p.transpose(0, 1).flatten(1), 1) for p in parts]
            shares = [len(p) / len(input) for p in parts]
            self.running_mean.lerp_(_mean([m for _, m in statistics], shares), rate)
            self.running_var.lerp_(_mean([v for v, _ in statistics], shares), rate)
        return torch.cat(out)


def _parts(x: Tensor, size: int) -> list[Tensor]:
    parts = list(x.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1 and size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([v * s for v, s in zip(values, shares, strict=True)]).sum(0)


convert = partial(convert_norms, cls=GhostBN, kind="ghost-bn")
"""Replace BN by ghost BN. Option: ``size``."""
