"""Ghost batch normalization (Hoffer, Hubara, Soudry, NeurIPS 2017, https://arxiv.org/abs/1705.08741).

A large batch is normalized in parts, each by its own statistics, so that the noise of small batches stays. Running
statistics move by the mean of the parts' statistics, as in Summers and Dinneen, ICLR 2020,
https://arxiv.org/abs/1906.03548.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.conversion import exchange
from fedbn.norms.statnorm import widened


class GhostBN(AnyBatchNorm):
    """BN over parts of the batch, ``[N, C, *positions]``; evaluation is BN's.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None: plain mean over all batches.
        affine: whether there are a scale and a shift.
        size: rows of a part; the last part is smaller where they do not divide the batch, and a single row left over
            joins the part before it.

    >>> GhostBN(1, size=2)(torch.tensor([[0.0], [2.0], [5.0], [9.0]])).round(decimals=3).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        size: int = 16,
    ) -> None:
        if size < 1:
            raise UserError(f"ghost batch normalization needs parts of at least one row, not size={size}")
        super().__init__(num_features, eps, momentum, affine)
        self.size = size

    def forward(self, input: Tensor) -> Tensor:
        """Normalized activations, of the input's shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        self.num_batches_tracked += 1
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        parts = _parts(widened(input), self.size)
        out = [F.batch_norm(p, None, None, self.weight, self.bias, True, 0.0, self.eps) for p in parts]
        with torch.no_grad():
            statistics = [torch.var_mean(p.transpose(0, 1).flatten(1), 1) for p in parts]
            shares = [len(p) / len(input) for p in parts]
            self.running_mean.lerp_(_mean([m for _, m in statistics], shares), step)
            self.running_var.lerp_(_mean([v for v, _ in statistics], shares), step)
        return torch.cat(out)


def _parts(x: Tensor, size: int) -> list[Tensor]:
    parts = list(x.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1 and size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([v * s for v, s in zip(values, shares, strict=True)]).sum(0)


def convert(model: nn.Module, *, size: int = 16) -> nn.Module:
    """Ghost BN for every normalization layer.

    >>> convert(nn.Sequential(nn.BatchNorm1d(4)), size=8)[0].size
    8
    """
    return exchange(model, GhostBN, "ghost-bn", size=size)
