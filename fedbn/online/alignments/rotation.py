r"""Rotation of a worn device, estimated from gravity.

The summaries of a window are its mean acceleration :math:`g`, which turns with the device, and the logarithms of the
variances of each sensor, :math:`e`, summed over its axes, which do not. Each class has
:math:`g\sim N(\mu_k,S_k)` and :math:`e\sim N(m_k,V_k)`, independent of each other. Seen clients turn onto the mean of
all by the rotation between class means (Kabsch, 1976, https://doi.org/10.1107/S0567739476001873), and
`fedbn.online.alignments.rotation_search` finds the rotation of a new user.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.sensors import IMPOSSIBLE, OTHER_UNIT, SATURATION, STEADY, clipped
from fedbn.errors import UserError
from fedbn.online.alignments import quaternions as so3
from fedbn.online.alignments.base import Alignment, AlignmentPrior
from fedbn.online.alignments.rotation_search import RotationSearch
from fedbn.online.sums import Triples

KABSCH_PRIOR = 0.3
"""Weight of the identity in the alignment of seen clients, relative to a class with gravity of 1."""

LEAST_SPREAD = 0.05
"""Least spread between clients in radians."""

TILT_NOISE = 0.03
"""Standard deviation added to the mean acceleration of a class, relative to gravity."""

LOG_VARIANCE_NOISE = 0.05
"""Variance added to the log variances of a class."""


@dataclass(frozen=True)
class Rotation(Alignment):
    """One rotation of all three-axis sensors of a device.

    >>> rotation = Rotation()
    >>> x = torch.arange(6.0).view(1, 3, 2)
    >>> torch.equal(rotation.apply(rotation.identity(4)[None], x, ((0, 1, 2),)), x)
    True
    """

    name = "rotation"
    about = "the orientation of a worn device, from gravity in each class"
    source = "proposed by this project, after Kabsch 1976 and Dempster, Laird, Rubin 1977"

    def identity(self, dims: int) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0, 0.0])

    def summaries(self, x: Tensor, triples: Triples) -> Tensor:
        self._require(x, triples)
        var, mean = torch.var_mean(x.double(), 2, correction=0)
        log_variance = var[:, _table(triples)].sum(2).add_(1e-6).log_()
        return torch.cat([mean[:, _index(triples[0])], log_variance], 1)

    def limits(self, prior: AlignmentPrior) -> tuple[float, bool]:
        """Gravity, and whether the classes have any."""
        return float(self.gravity(prior)), self.informative(prior)

    def usable(self, x: Tensor, z: Tensor, limits: tuple[float, bool], triples: Triples) -> Tensor:
        gravity, informative = limits
        acceleration, largest = x[:, _index(triples[0])], SATURATION * gravity
        usable = ~clipped(acceleration, largest).numpy(force=True).any(1)
        if informative:
            ratio = np.linalg.norm(z[:, :3].numpy(force=True), axis=1) / gravity
            if ratio.max(initial=0) > IMPOSSIBLE:
                raise self._unit_error(float(ratio.max()))
            usable &= (ratio > 1 / OTHER_UNIT) & (ratio < OTHER_UNIT)
        return torch.from_numpy(usable).to(x.device)

    def informative(self, prior: AlignmentPrior) -> bool:
        return bool(self.gravity(prior) > prior.scale[:3].norm())

    def check(self, z: Tensor, prior: AlignmentPrior) -> None:
        length = z[:, :3].norm(dim=1)
        ratio = float(length.median() / self.gravity(prior))
        measures_gravity = bool(length.std() < STEADY * length.median())
        if measures_gravity and not 1 / OTHER_UNIT < ratio < OTHER_UNIT:
            raise self._unit_error(ratio)

    @staticmethod
    def gravity(prior: AlignmentPrior) -> Tensor:
        """Mean length of the classes' mean accelerations, 0-d."""
        return prior.mean[prior.seen, :3].norm(dim=1).mean()

    def transform(self, value: Tensor, z: Tensor) -> Tensor:
        return torch.cat([z[:, :3] @ so3.to_matrix(value).T, z[:, 3:]], 1)

    def coordinates(self, value: Tensor) -> Tensor:
        return so3.to_vector(value)

    def register(self, prior: AlignmentPrior, means: Tensor, classes: Tensor) -> Tensor:
        return closest_rotation(prior.mean[classes, :3], means[:, :3], KABSCH_PRIOR * self.gravity(prior) ** 2)

    def covariance(self, cov: Tensor, mean: Tensor) -> Tensor:
        noise = torch.full_like(mean[0], LOG_VARIANCE_NOISE)
        noise[:3] = (TILT_NOISE * mean[:, :3].norm(dim=1).max()) ** 2 + 1e-12
        out = cov + noise.diag()
        out[:, :3, 3:] = out[:, 3:, :3] = 0
        return out

    def spread(self, square: Tensor, cov: Tensor) -> Tensor:
        return square.mean().clamp_min(LEAST_SPREAD**2).expand(3).clone()

    def estimator(self, prior: AlignmentPrior) -> RotationSearch:
        return RotationSearch(prior, self.b)

    def apply(self, value: Tensor, x: Tensor, triples: Triples) -> Tensor:
        self._require(x, triples)
        matrix, out = torch.from_numpy(so3.to_matrix(value.numpy(force=True))).to(x), x.clone()
        for channels in triples:
            out[:, _index(channels)] = matrix @ x[:, _index(channels)]
        return out

    def valid(self, value: Tensor) -> bool:
        return abs(float(value.norm()) - 1) < 1e-3

    def report(self, value: Tensor) -> dict[str, Any]:
        """Axis, and angle in degrees."""
        vector = so3.to_vector(value.double())
        return {
            "degrees": float(vector.norm().rad2deg()),
            "axis": [round(v, 4) for v in F.normalize(vector, dim=0).tolist()],
        }

    @staticmethod
    def _unit_error(ratio: float) -> UserError:
        return UserError(
            f"a mean acceleration is {ratio:.3g} times the seen clients' gravity: use one unit for all of them (1 g is "
            "9.81 m/s2)"
        )

    def _require(self, x: Tensor, triples: Triples) -> None:
        if not triples:
            raise UserError(
                "alignment 'rotation' needs to know the channels of each sensor's axes, which this scenario does not "
                "name: set triples of its Population or of scenario files (triples=0+1+2), or use another alignment"
            )
        if x.dim() != 3 or x.shape[1] <= max(max(t) for t in triples):
            raise UserError(
                f"alignment 'rotation' works on windows [channels, length] with the channels {triples}, not on "
                f"examples of shape {list(x.shape[1:])}"
            )


def closest_rotation(target: Tensor, points: Tensor, weight: Tensor | float = 0.0) -> Tensor:
    """Rotation ``[4]`` that moves ``points`` ``[n, 3]`` closest to ``target``, in squared distance (Kabsch, 1976).

    Args:
        target: ``[n, 3]``.
        points: ``[n, 3]``.
        weight: weight of the identity, in squared units of the points.

    >>> target, points = torch.eye(3)[[1, 2]], torch.eye(3)[[0, 2]]
    >>> so3.to_vector(closest_rotation(target, points)).rad2deg().round().abs()
    tensor([ 0.,  0., 90.])
    """
    u, _, v = torch.linalg.svd(target.T @ points + weight * torch.eye(3).to(points))
    sign = torch.ones(3).to(points)
    sign[2] = torch.linalg.det(u @ v)
    return so3.from_matrix(u @ sign.diag() @ v)


@lru_cache(maxsize=8)
def _table(triples: Triples) -> Tensor:
    """Channels ``[sensors, 3]``."""
    return torch.tensor(triples)


def _index(channels: tuple[int, int, int]) -> slice | list[int]:
    """Index of three channels; a slice if they are neighbors, which is much faster."""
    first = channels[0]
    return slice(first, first + 3) if channels == (first, first + 1, first + 2) else list(channels)
