r"""An algebra of means and variances: of a batch, a client, a user, a population.

A set of :math:`n` values with mean :math:`\mu` and :math:`M_2=\sum_i (x_i-\mu)^2` is ``Moments(n, mean, m2)``.
Union of disjoint sets is `merge` (Chan, Golub and LeVeque, 1979, *Updating formulae and a pairwise
algorithm for computing sample variances*): with :math:`\delta=\mu_b-\mu_a`,

.. math:: n=n_a+n_b,\quad \mu=\mu_a+\delta\,n_b/n,\quad M_2=M_{2a}+M_{2b}+\delta^2\,n_a n_b/n .

It is a commutative monoid with the empty set as unit. `unmerge` removes a part, `decay` down-weights the past,
`shrink` merges with a prior that counts as ``n0`` values. All arithmetic is in float64, so a difference of large sums
does not lose the variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per channel, of one set of values or of a batch of K sets.

    Attributes:
        n: 0-d float64, number of values per channel (samples times positions); ``[K, 1]`` for K sets.
        mean: ``[C]`` float64; ``[K, C]`` for K sets.
        m2: like ``mean``, non-negative.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def empty(channels: int) -> Moments:
        """Moments of the empty set, the unit of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return Moments(torch.zeros((), dtype=torch.float64), zeros, zeros)

    @staticmethod
    def of(x: Tensor) -> Moments:
        """Moments of activations ``[N, C, *positions]`` over all axes except the channels.

        >>> Moments.of(torch.tensor([[0.0], [1.0], [2.0], [3.0]])).variance()
        tensor([1.2500], dtype=torch.float64)
        """
        rows = x.detach().to(torch.float64).transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        n = torch.tensor(float(rows.shape[1]), dtype=torch.float64)
        return Moments(n, mean.cpu(), ((rows - mean[:, None]) ** 2).sum(1).cpu())

    @staticmethod
    def from_variance(n: float | Tensor, mean: Tensor, variance: Tensor, *, unbiased: bool = False) -> Moments:
        """Moments of ``n`` values with a given mean and variance (``unbiased``: divided by ``n - 1``)."""
        count = torch.as_tensor(n, dtype=torch.float64)
        return Moments(count, mean.double(), variance.double() * (count - 1 if unbiased else count))

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Variance per channel, ``[C]``: biased as used for normalization, or unbiased as stored by PyTorch.

        Raises:
            ValueError: there are too few values.
        """
        dof = self.n - 1 if unbiased else self.n
        if (dof <= 0).any():
            raise ValueError(f"{float(self.n.min()):g} values have no {'unbiased ' if unbiased else ''}variance")
        return self.m2 / dof

    def stored_variance(self) -> Tensor:
        """Variance as stored by PyTorch: unbiased, and zero for a single value.

        >>> Moments.of(torch.tensor([[3.0]])).stored_variance()
        tensor([0.], dtype=torch.float64)

        Raises:
            ValueError: there are no values.
        """
        dof = torch.where(self.n > 1, self.n - 1, self.n)
        return Moments(dof, self.mean, self.m2).variance()

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets."""
        n = self.n + other.n
        if not n.any():
            return self
        delta = other.mean - self.mean
        share = other.n / n
        return Moments(n, self.mean + delta * share, self.m2 + other.m2 + delta**2 * (self.n * share))

    def unmerge(self, part: Moments) -> Moments:
        """Remove a previously merged part, for example to erase one recording.

        Raises:
            ValueError: the part has more values than this set.
        """
        n = self.n - part.n
        if n < 0:
            raise ValueError(f"cannot remove {float(part.n):g} values from {float(self.n):g}")
        if n == 0:
            return Moments.empty(len(self.mean))
        mean = self.mean + (self.mean - part.mean) * (part.n / n)
        m2 = self.m2 - part.m2 - (part.mean - mean) ** 2 * (part.n * n / self.n)
        return Moments(n, mean, m2.clamp_min(0.0))

    def decay(self, factor: float) -> Moments:
        """Multiply the weight of all values by ``factor``; mean and variance do not change.

        Raises:
            ValueError: ``factor`` outside [0, 1].
        """
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"the decay factor must be in [0, 1], not {factor}")
        return Moments(self.n * factor, self.mean, self.m2 * factor)

    def shrink(self, prior: Moments, n0: float) -> Moments:
        """Merge with a prior that counts as ``n0`` values (``n0=0``: no prior).

        Raises:
            ValueError: ``n0`` is negative.
        """
        if n0 < 0:
            raise ValueError(f"the weight of a prior must be n0 >= 0, not {n0}")
        return Moments(torch.tensor(n0, dtype=torch.float64), prior.mean, prior.variance() * n0).merge(self)

    def w2(self, other: Moments) -> Tensor:
        """2-Wasserstein distance (0-d) between the diagonal Gaussians of these moments.

        >>> a = Moments.of(torch.tensor([[0.0], [2.0]])); b = Moments.of(torch.tensor([[3.0], [5.0]]))
        >>> float(a.w2(b))
        3.0
        """
        std_difference = self.variance().sqrt() - other.variance().sqrt()
        return torch.sqrt(((self.mean - other.mean) ** 2).sum() + (std_difference**2).sum())


def pooled(parts: Iterable[Moments]) -> Moments:
    """Moments of the union of all parts."""
    return reduce(Moments.merge, parts)


MAX_STACKED_ELEMENTS = 2**16
"""Largest tensor whose values are stacked before averaging; copying larger ones costs more than it saves."""

STACK_SIZE = 1024
"""Number of values that are stacked at once; larger stacks only use more memory."""

STACK_COLUMNS = 256
"""Number of elements of stacked values that are converted and summed at once, so that they stay in the cache."""


def naive_mean(values: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean of tensors or of the rows of one, in float64 (complex128 for complex values); the dtype is kept.

    It is correct for weights and means. For variances it ignores the variance between the parts' means, as FedAvg on a
    whole state dict does; it is the baseline for `pooled_variance`.
    """
    total, first = float(sum(weights)), values[0]
    wide = torch.promote_types(first.dtype, torch.float64)
    if first.numel() <= MAX_STACKED_ELEMENTS:
        shares = torch.tensor(weights, dtype=torch.float64, device=first.device) / total
        mean = torch.zeros(first.numel(), dtype=wide, device=first.device)
        # Rest columns belong to the last part: PyTorch sums a single column in another order.
        bounds = tuple(range(STACK_COLUMNS, first.numel() - STACK_COLUMNS + 1, STACK_COLUMNS))
        for i in range(0, len(values), STACK_SIZE):
            flat = _stacked(values[i : i + STACK_SIZE]).reshape(-1, first.numel())
            for columns, sums in zip(flat.tensor_split(bounds, 1), mean.tensor_split(bounds), strict=True):
                sums += columns.to(wide, copy=True).mul_(shares[i : i + STACK_SIZE, None]).sum(0)
        return mean.view(first.shape).to(first.dtype)
    acc = torch.zeros_like(first, dtype=wide)
    for value, weight in zip(values, weights, strict=True):
        acc.add_(value, alpha=weight / total)
    return acc.to(first.dtype)


def _stacked(values: Sequence[Tensor] | Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else torch.stack(list(values))


def pooled_variance(
    means: Sequence[Tensor] | Tensor, variances: Sequence[Tensor] | Tensor, weights: Sequence[float]
) -> Tensor:
    """Law of total variance: mean of the variances plus variance of the means, computed in float64.

    It is exact for biased variances, or for parts so large that ``n - 1`` and ``n`` hardly differ. The dtype is kept.
    """
    shares = torch.tensor(weights, dtype=torch.float64) / float(sum(weights))
    shape = (-1, *[1] * variances[0].dim())
    mu, var = (_stacked(values).double().cpu() for values in (means, variances))
    w = shares.view(shape)
    center = (w * mu).sum(0)
    return (w * (var + (mu - center) ** 2)).sum(0).to(variances[0].device, variances[0].dtype)
