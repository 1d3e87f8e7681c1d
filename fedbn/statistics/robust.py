r"""Robust aggregation of statistics, which limits the influence of a minority of clients.

The estimate is a robust location of the means, :math:`\tilde\mu`, and the same location of the second moments about it,
:math:`\sigma_k^2+(\mu_k-\tilde\mu)^2`. Without outliers and without trimming this is the law of total variance.
Coordinate-wise median and trimmed mean: Yin, Chen, Ramchandran, Bartlett, 2018,
https://arxiv.org/abs/1803.01498.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Location = Literal["trimmed", "median"]


def location(values: Sequence[Tensor], how: Location, trim: float) -> Tensor:
    """Coordinate-wise location of tensors of the same shape, in float64.

    Args:
        values: one per client; NaN counts as infinity.
        how: median, or trimmed mean.
        trim: share of the values that is cut off at each end.

    >>> location([torch.tensor([x]) for x in (1.0, 2.0, 3.0, 1e9)], "trimmed", 0.25)
    tensor([2.5000], dtype=torch.float64)
    """
    stacked = torch.stack([v.double().cpu() for v in values]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if how == "median":
        return stacked.quantile(0.5, 0)
    from scipy.stats import trim_mean  # imported for the trimmed mean only: scipy.stats is slow to import

    return torch.as_tensor(trim_mean(stacked.numpy(), trim, axis=0), dtype=torch.float64)


def robust_moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], how: Location, trim: float
) -> tuple[Tensor, Tensor]:
    """Robust mean and variance over all clients, ``[C]`` each in float64.

    >>> one = torch.ones(1)
    >>> robust_moments([-3 * one, 3 * one], [one, one], "trimmed", 0.0)
    (tensor([0.], dtype=torch.float64), tensor([10.], dtype=torch.float64))
    """
    center = location(means, how, trim)
    second = [v.double().cpu() + (m.double().cpu() - center) ** 2 for m, v in zip(means, variances, strict=True)]
    return center, location(second, how, trim).clamp_min(0.0)
