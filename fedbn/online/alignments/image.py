r"""Brightness, contrast and inversion of a user's images, estimated from their histograms in each class.

The summaries of an image are the mean m and the logarithm of the standard deviation of its values, their skewness,
which an inversion negates, and two numbers that do not change: the logarithm of the kurtosis, and that of the ratio
between the standard deviations of neighboring differences and of values. Values are centered, so an inversion is
:math:`x\mapsto-x`. `fedbn.online.alignments.affine` finds the transformation of a new user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.alignments.affine import AffineLayout, AffineSearch, log_deviation, register
from fedbn.online.alignments.base import Alignment, AlignmentPrior
from fedbn.online.sums import Triples

IDENTITY_WEIGHT = 0.3
"""Weight of the identity in the alignment of seen clients, relative to a class."""

NOISE = (0.02, 0.02, 0.1, 0.05, 0.02)
"""Variances added to the summaries of a class; that of the mean is relative to the mean variance of an image."""

LAYOUT = AffineLayout(1, odd=1, signed=True)

UNDETERMINED = 1.0
"""Standard deviation of log deviations within classes from which they do not determine the contrast."""

BLANK = -6.0
"""Log deviation of an image that shows nothing."""


@dataclass(frozen=True)
class Image(Alignment):
    """Brightness, contrast and inversion of images.

    >>> image = Image()
    >>> x = torch.arange(8.0).view(1, 2, 2, 2)
    >>> torch.equal(image.apply(torch.tensor([[0.0, 0.0, 1.0]]), x, ()), -x)
    True
    """

    name = "image"
    about = "brightness, contrast, inversion of images, by class histograms"
    source = "proposed by this project, after Dempster, Laird, Rubin 1977"

    def identity(self, dims: int) -> Tensor:
        return torch.zeros(3)

    def summaries(self, x: Tensor, triples: Triples) -> Tensor:
        _require(x)
        x = x.double()
        flat = x.flatten(1)
        spread = log_deviation(flat)
        scaled = (flat - flat.mean(1, keepdim=True)) / spread.exp()[:, None]
        steps = torch.cat([x.diff(dim=2).flatten(1), x.diff(dim=3).flatten(1)], 1)
        edges = 0.5 * (steps.square().mean(1) + 1e-8).log() - spread
        kurtosis = (scaled.pow(4).mean(1) + 1e-3).log()
        return torch.stack([flat.mean(1), spread, scaled.pow(3).mean(1), edges, kurtosis], 1)

    def limits(self, prior: AlignmentPrior) -> None:
        return None

    def usable(self, x: Tensor, z: Tensor, limits: None, triples: Triples) -> Tensor:
        return z[:, 1] > BLANK

    def informative(self, prior: AlignmentPrior) -> bool:
        return bool(prior.scale[1] < UNDETERMINED)

    def transform(self, value: Tensor, z: Tensor) -> Tensor:
        return LAYOUT.transform(value, z)

    def coordinates(self, value: Tensor) -> Tensor:
        return value

    def register(self, prior: AlignmentPrior, means: Tensor, classes: Tensor) -> Tensor:
        return register(LAYOUT, prior, means, classes, IDENTITY_WEIGHT)

    def covariance(self, cov: Tensor, mean: Tensor) -> Tensor:
        noise = torch.tensor(NOISE).to(cov)
        noise[0] = noise[0] * (2 * mean[:, 1]).exp().mean()
        return (cov.diagonal(dim1=1, dim2=2) + noise).diag_embed()

    def spread(self, square: Tensor, cov: Tensor) -> Tensor:
        return LAYOUT.spread(square, cov.diagonal(dim1=1, dim2=2).mean(0))

    def estimator(self, prior: AlignmentPrior) -> AffineSearch:
        return AffineSearch(LAYOUT, prior, self.b)

    def apply(self, value: Tensor, x: Tensor, triples: Triples) -> Tensor:
        _require(x)
        gain, offset, sign = (part.to(x)[:, :, None, None] for part in LAYOUT.split(value))
        return sign * gain.exp() * x + offset

    def report(self, value: Tensor) -> dict[str, Any]:
        """Contrast, brightness, and whether the image is inverted."""
        gain, offset, negative = value.double().tolist()
        contrast = float(torch.tensor(gain).exp())
        return {"contrast": round(contrast, 4), "brightness": round(offset, 4), "inverted": negative > 0.5}


def _require(x: Tensor) -> None:
    if x.dim() != 4:
        raise UserError(
            f"alignment 'image' works on images [channels, height, width], not on examples of shape "
            f"{list(x.shape[1:])}; for sensors use rotation or gain"
        )
