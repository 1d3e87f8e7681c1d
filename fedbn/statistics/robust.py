r"""Location estimates that a minority of clients cannot move far, for statistics.

In moments space: a robust location of the means, :math:`\tilde\mu`, and the same location of the second moments
about it, :math:`\sigma_k^2+(\mu_k-\tilde\mu)^2`. Without outliers and with nothing cut off this is the law of total
variance. Coordinate-wise median and trimmed mean: Yin, Chen, Ramchandran, Bartlett, 2018,
https://arxiv.org/abs/1803.01498.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.stats import trim_mean
from torch import Tensor

Location = Literal["trimmed", "median"]


def location(values: Sequence[Tensor], how: Location, trim: float) -> Tensor:
    """Coordinate-wise location of equally shaped tensors, in float64.

    Args:
        values: one a client; a NaN counts as infinitely large.
        how: median, or mean without the extremes.
        trim: share of the values cut off at either end.

    >>> location([torch.tensor([x]) for x in (1.0, 2.0, 3.0, 1e9)], "trimmed", 0.25)
    tensor([2.5000], dtype=torch.float64)
    """
    stacked = torch.stack([v.double().cpu() for v in values]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if how == "median":
        return stacked.quantile(0.5, 0)
    return torch.as_tensor(trim_mean(stacked.numpy(), trim, axis=0), dtype=torch.float64)


def robust_moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], how: Location, trim: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of all clients together, ``[C]`` each in float64, whatever a minority sends.

    >>> one = torch.ones(1)
    >>> robust_moments([-3 * one, 3 * one], [one, one], "trimmed", 0.0)
    (tensor([0.], dtype=torch.float64), tensor([10.], dtype=torch.float64))
    """
    center = location(means, how, trim)
    seconds = [v.double().cpu() + (m.double().cpu() - center) ** 2 for m, v in zip(means, variances, strict=True)]
    return center, location(seconds, how, trim).clamp_min(0.0)
