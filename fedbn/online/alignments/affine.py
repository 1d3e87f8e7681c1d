r"""Search for gains, offsets and a sign of the channels of a user: expectation maximization in closed form.

A window's channel c has a mean :math:`m_c` and a logarithm :math:`l_c` of its standard deviation. The transformation
:math:`x_c\mapsto\sigma e^{g_c}x_c+d_c` with a sign :math:`\sigma` common to all channels moves them to
:math:`\sigma e^{g_c}m_c+d_c` and :math:`l_c+g_c`. Other summaries change only their sign, or not at all. All
covariances are diagonal, so the M step is a Gauss-Newton step on two unknowns per channel (Dempster, Laird, Rubin,
1977, https://doi.org/10.1111/j.2517-6161.1977.tb01600.x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.online.alignments.base import MARGIN, AlignmentPrior

STEPS = 12
"""Largest number of steps of a search."""

LONGEST = 0.5
"""Largest change of a log gain in a step."""

CONVERGED = 1e-4
"""Change of all log gains below which a search ends."""

FLOOR = {"gain": 0.02, "offset": 0.05}
"""Least spread between clients: of log gains, and of offsets in units of the spread of means within classes."""


@dataclass(frozen=True)
class AffineLayout:
    """Order of summaries and parameters.

    Summaries are ``channels`` means, ``channels`` log standard deviations, ``odd`` numbers that a negative sign
    negates, and others. Parameters are log gains and offsets and, with ``signed``, 1 for a negative sign and else 0.

    Attributes:
        channels: number of channels C.
        odd: number of summaries that change their sign.
        signed: whether the sign can be negative.
    """

    channels: int
    odd: int = 0
    signed: bool = False

    def split(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log gains ``[..., C]``, offsets ``[..., C]`` and sign ``[..., 1]`` of parameters ``[..., P]``."""
        size = self.channels
        sign = 1 - 2 * value[..., 2 * size :] if self.signed else torch.ones_like(value[..., :1])
        return value[..., :size], value[..., size : 2 * size], sign

    def transform(self, value: Tensor, z: Tensor) -> Tensor:
        """Summaries ``[..., M, D]`` of transformed windows, for parameters ``[..., P]``."""
        gain, offset, sign = (part[..., None, :] for part in self.split(value))
        mean, spread, odd, rest = self.parts(z)
        moved = [sign * gain.exp() * mean + offset, spread + gain, sign * odd]
        return torch.cat([*moved, rest.expand(*moved[0].shape[:-1], -1)], -1)

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means, log standard deviations, odd and other summaries."""
        size = self.channels
        return (
            z[..., :size],
            z[..., size : 2 * size],
            z[..., 2 * size : 2 * size + self.odd],
            z[..., 2 * size + self.odd :],
        )

    def spread(self, square: Tensor, variance: Tensor) -> Tensor:
        """Variances of the parameters from the clients' mean squares; the gains of all channels have the same."""
        size = self.channels
        gain = square[:size].mean().clamp_min(FLOOR["gain"] ** 2).expand(size)
        offset = torch.maximum(square[size : 2 * size], FLOOR["offset"] ** 2 * variance[:size])
        if not self.signed:
            return torch.cat([gain, offset])
        share = square[2 * size :].clamp(0.02, 0.49)
        # Half the squared parameter over this number is the log odds of a negative sign.
        return torch.cat([gain, offset, 0.5 / ((1 - share) / share).log()])


class AffineSearch:
    """Finds parameters with a large penalized likelihood.

    Args:
        layout: order of summaries and parameters.
        prior: with diagonal covariances.
        b: successive windows that count as one independent window.
    """

    def __init__(self, layout: AffineLayout, prior: AlignmentPrior, b: float) -> None:
        self.layout, self.b, self.penalty = layout, b, 1 / prior.spread
        self.precision = 1 / prior.cov.diagonal(dim1=1, dim2=2)
        self.weighted_mean = self.precision * prior.mean
        self.mean, self.log_scale = prior.mean, prior.log_scale
        self.constant = prior.log_scale - 0.5 * (self.weighted_mean * prior.mean).sum(1)

    def __call__(self, cells: tuple[Tensor, Tensor], last: Tensor, full: bool = True) -> Tensor:
        """Parameters ``[U, P]`` with the largest objective among those found; the identity is a candidate.

        A full search starts from the identity and from the other sign, too.
        """
        n, z = cells
        identity = torch.zeros_like(last)[:, None]
        starts = torch.cat([identity, last[:, None]], 1) if full else last[:, None]
        if full and self.layout.signed:
            flipped = starts.clone()
            flipped[..., -1] = 1 - flipped[..., -1]
            starts = torch.cat([starts, flipped], 1)
        found = torch.cat([identity, self.refine(n, z, starts)], 1)
        objective = self.objective(n, z, found)
        objective[:, 0] += MARGIN
        return found[torch.arange(len(n), device=n.device), objective.argmax(1)]

    def refine(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """Parameters after steps from parameters ``[U, S, P]``; the sign stays."""
        size = self.layout.channels
        precision, weighted = self.precision[:, : 2 * size], self.weighted_mean[:, : 2 * size]
        z, weight = z[:, None], (n / self.b)[:, None, :, None]
        mean, spread = z[..., :size], z[..., size : 2 * size]
        gain_penalty, offset_penalty = self.penalty[:size], self.penalty[size : 2 * size]
        for _ in range(STEPS):
            gain, offset, sign = self.layout.split(value)
            p = self._joint(z, value).softmax(-1) * weight
            of_mean, of_spread = (p @ precision).split(size, -1)
            target_mean, target_spread = (p @ weighted).split(size, -1)
            slope = (sign * gain.exp())[..., None, :] * mean
            residual = of_mean * (slope + offset[..., None, :]) - target_mean
            a = (of_mean * slope.square() + of_spread).sum(-2) + gain_penalty
            b = (of_mean * slope).sum(-2)
            c = of_mean.sum(-2) + offset_penalty
            first = (slope * residual + of_spread * (spread + gain[..., None, :]) - target_spread).sum(-2)
            first = first + gain_penalty * gain
            second = residual.sum(-2) + offset_penalty * offset
            determinant = (a * c - b * b).clamp_min(1e-300)
            step = ((b * second - c * first) / determinant).clamp(-LONGEST, LONGEST)
            # The offset that is best for this step of the gain.
            shift = -(second + b * step) / c.clamp_min(1e-300)
            value = torch.cat([gain + step, offset + shift, value[..., 2 * size :]], -1)
            if float(step.abs().max()) < CONVERGED:
                break
        return value

    def objective(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """Penalized log-likelihood J ``[U, S]`` of parameters ``[U, S, P]`` for cells ``[U, M]``, ``[U, M, D]``."""
        return self.likelihood(n, z, value) - 0.5 * (value.square() * self.penalty).sum(-1)

    def likelihood(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """The objective without its penalty."""
        return (self._joint(z[:, None], value).logsumexp(-1) * n[:, None]).sum(-1) / self.b

    def bound(self, n: Tensor, z: Tensor) -> Tensor:
        """An upper bound ``[U]`` of the objective: every summary that changes is at the mean of each class."""
        rest = slice(2 * self.layout.channels + self.layout.odd, None)
        fixed, precision, weighted = z[..., rest], self.precision[:, rest], self.weighted_mean[:, rest]
        constant = self.log_scale - 0.5 * (weighted * self.mean[:, rest]).sum(1)
        joint = fixed @ weighted.T - 0.5 * fixed.square() @ precision.T + constant
        return (joint.logsumexp(-1) * n).sum(-1) / self.b

    def _joint(self, z: Tensor, value: Tensor) -> Tensor:
        """Log densities ``[U, S, M, K]`` of the transformed cells, without constants."""
        moved = self.layout.transform(value, z)
        return moved @ self.weighted_mean.T - 0.5 * moved.square() @ self.precision.T + self.constant


def register(layout: AffineLayout, prior: AlignmentPrior, means: Tensor, classes: Tensor, weight: float) -> Tensor:
    """Parameters ``[P]`` that move class means ``[C, D]`` to the prior's, with known classes.

    Args:
        layout: order of summaries and parameters.
        prior: of the round before.
        means: class means of a client.
        classes: their classes.
        weight: weight of the identity, relative to one class.
    """
    precision, target = 1 / prior.cov.diagonal(dim1=1, dim2=2)[classes], prior.mean[classes]
    mean, spread, odd, _ = layout.parts(means)
    wanted_mean, wanted_spread, wanted_odd, _ = layout.parts(target)
    of_mean, of_spread, of_odd, _ = layout.parts(precision)
    gain = (of_spread * (wanted_spread - spread)).sum(0) / (of_spread.sum(0) + weight * of_spread.mean(0))
    found = []
    for sign in (1.0, -1.0)[: 1 + layout.signed]:
        rest = wanted_mean - sign * gain.exp() * mean
        offset = (of_mean * rest).sum(0) / (of_mean.sum(0) + weight * of_mean.mean(0))
        cost = (of_mean * (rest - offset).square()).sum() + (of_odd * (wanted_odd - sign * odd).square()).sum()
        cost = cost + weight * (of_mean.mean(0) * offset.square()).sum()
        found.append(
            (float(cost), torch.cat([gain, offset, *([gain.new_tensor([sign < 0])] if layout.signed else [])]))
        )
    return min(found, key=lambda pair: pair[0])[1]


def log_deviation(x: Tensor) -> Tensor:
    """Logarithm of the standard deviations of ``[..., T]`` values; finite for constant ones."""
    return 0.5 * x.var(-1, correction=0).add(1e-8).log()
