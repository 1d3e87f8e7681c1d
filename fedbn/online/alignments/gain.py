r"""Gain and offset of every channel of a sensor, estimated from means and deviations in each class.

The summaries of a window are the mean and the logarithm of the standard deviation of every channel. Each class has
independent Gaussians of them. `fedbn.online.alignments.affine` finds the gains and offsets of a new user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedbn.data.sensors import clipped
from fedbn.errors import UserError
from fedbn.online.alignments.affine import AffineLayout, AffineSearch, log_deviation, register
from fedbn.online.alignments.base import Alignment, AlignmentPrior
from fedbn.online.sums import Triples

IDENTITY_WEIGHT = 0.3
"""Weight of the identity in the alignment of seen clients, relative to a class."""

MEAN_NOISE = 0.05
"""Standard deviation added to the means of a class, in units of the channel's mean deviation."""

LOG_NOISE = 0.05
"""Variance added to the log deviations of a class."""

UNDETERMINED = 1.0
"""Standard deviation of log deviations within classes from which they do not determine a gain."""

SATURATION = 3.0
"""Distance from the mean, in standard deviations of the most active class, up to which a repeated extreme value is
normal."""

ANOTHER_UNIT = 1.4
"""Log deviation above that of the most active class, in every channel, that only another unit explains."""

DEAD = -4.0
"""Difference of a log deviation to the smallest of a class below which a channel is dead."""


@dataclass(frozen=True)
class Gain(Alignment):
    """A gain and an offset of each channel.

    >>> gain = Gain()
    >>> x = torch.arange(6.0).view(1, 3, 2)
    >>> torch.equal(gain.apply(gain.identity(6)[None], x, ()), x)
    True
    """

    name = "gain"
    about = "gain and offset of channels, from each class's mean and spread"
    source = "proposed by this project, after Dempster, Laird, Rubin 1977"

    def identity(self, dims: int) -> Tensor:
        return torch.zeros(dims)

    def summaries(self, x: Tensor, triples: Triples) -> Tensor:
        _require(x)
        x = x.double()
        return torch.cat([x.mean(2), log_deviation(x)], 1)

    def limits(self, prior: AlignmentPrior) -> tuple[Tensor, Tensor, Tensor]:
        """Log deviations of the most and of the least active class, and the largest normal values, ``[C]`` each."""
        mean, classes = _layout(prior.mean).parts(prior.mean[prior.seen])[:2]
        loudest = classes.amax(0)
        return loudest, classes.amin(0) + DEAD, mean.abs().amax(0) + SATURATION * loudest.exp()

    def usable(self, x: Tensor, z: Tensor, limits: tuple[Tensor, Tensor, Tensor], triples: Triples) -> Tensor:
        loudest, dead, top = limits
        spread = z[:, z.shape[1] // 2 :]
        _require_unit(spread, loudest)
        return ~clipped(x, top).any(1) & (spread > dead).all(1)

    def informative(self, prior: AlignmentPrior) -> bool:
        return bool((_layout(prior.mean).parts(prior.scale)[1] < UNDETERMINED).any())

    def check(self, z: Tensor, prior: AlignmentPrior) -> None:
        _require_unit(z[:, z.shape[1] // 2 :].median(0).values[None], self.limits(prior)[0])

    def transform(self, value: Tensor, z: Tensor) -> Tensor:
        return _layout(z).transform(value, z)

    def coordinates(self, value: Tensor) -> Tensor:
        return value

    def register(self, prior: AlignmentPrior, means: Tensor, classes: Tensor) -> Tensor:
        return register(_layout(means), prior, means, classes, IDENTITY_WEIGHT)

    def covariance(self, cov: Tensor, mean: Tensor) -> Tensor:
        spread = _layout(mean).parts(mean)[1].exp().mean(0)
        noise = torch.cat([(MEAN_NOISE * spread).square() + 1e-12, torch.full_like(spread, LOG_NOISE)])
        return (cov.diagonal(dim1=1, dim2=2) + noise).diag_embed()

    def spread(self, square: Tensor, cov: Tensor) -> Tensor:
        return _layout(cov).spread(square, cov.diagonal(dim1=1, dim2=2).mean(0))

    def estimator(self, prior: AlignmentPrior) -> AffineSearch:
        return AffineSearch(_layout(prior.mean), prior, self.b)

    def apply(self, value: Tensor, x: Tensor, triples: Triples) -> Tensor:
        _require(x)
        gain, offset = value.to(x).split(x.shape[1], 1)
        return gain.exp()[:, :, None] * x + offset[:, :, None]

    def report(self, value: Tensor) -> dict[str, Any]:
        """Gain and offset of each channel."""
        gain, offset = value.double().chunk(2)
        return {"gain": [round(v, 4) for v in gain.exp().tolist()], "offset": [round(v, 4) for v in offset.tolist()]}


def _layout(z: Tensor) -> AffineLayout:
    return AffineLayout(z.shape[-1] // 2)


def _require_unit(spread: Tensor, loudest: Tensor) -> None:
    excess = (spread - loudest).amin(1)
    if len(excess) and float(excess.max()) > ANOTHER_UNIT:
        raise UserError(
            f"every channel varies at least {float(excess.max().exp()):.3g} times as much as in the seen clients' most "
            "active class: use one unit for all of them (1 g is 9.81 m/s2)"
        )


def _require(x: Tensor) -> None:
    if x.dim() != 3:
        raise UserError(
            f"alignment 'gain' works on windows [channels, length], not on examples of shape {list(x.shape[1:])}; for "
            "images use image"
        )
