r"""Search for the rotation of a device: expectation maximization on the rotations SO(3).

With the mean accelerations :math:`g_t` and weights :math:`n_t` of the cells of a stream, a step (Dempster, Laird,
Rubin, 1977, https://doi.org/10.1111/j.2517-6161.1977.tb01600.x) with a Gauss-Newton step on the rotation as M step is

.. math::
    p_{tk} &\propto N(R g_t;\mu_k,S_k)\,N(e_t;m_k,V_k)\\
    R &\leftarrow \exp(\delta)R,\quad
    \delta=\arg\min_\delta\sum_{tk}\tfrac{n_t p_{tk}}{b}\|R g_t+\delta\times Rg_t-\mu_k\|^2_{S_k^{-1}}
      +\rho\,\|\log R+\delta\|^2/s^2 .

The prior of a rotation is a mixture: most devices are worn as those of the seen clients, :math:`\log R\sim N(0,s^2)`,
and a share :data:`OTHERWISE` of them in any other way, :math:`R` uniform on SO(3). :math:`\rho` is the probability of
the first part for the present R. Without the second part, a device that is turned by 90 degrees would have to
contradict a spread of 7 degrees, and would not be followed.

The density of a class and, given :math:`p`, the normal equations are linear in :math:`\phi(q)=(qq^\top,q,1)` with
:math:`q=Rg`, so that a step is a few matrix products over all users, starts, cells and classes. So is the density of
:math:`e` in :math:`\phi(e)`. NumPy computes them, because calls of PyTorch take longer than these products for a single
user.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.online.alignments import quaternions as so3
from fedbn.online.alignments.base import MARGIN, AlignmentPrior

Array = npt.NDArray[Any]

EYE = np.eye(3)

OTHERWISE = 0.05
"""Prior probability that a device is worn in any way, rather than about as those of the seen clients."""

KEPT = 6
"""Number of starts that the search follows to the end, after one step from each."""

STEPS = 8
"""Largest number of steps of a search."""

LONGEST = 0.5
"""Longest step in radians."""

CONVERGED = 1e-3
"""Length of a step in radians below which a search ends."""

CHUNK = 256
"""Users whose rotations are estimated together."""


class RotationSearch:
    """Finds rotations with a large penalized likelihood.

    Args:
        prior: summaries are three means of acceleration, and values that a rotation does not change.
        b: successive windows that count as one independent window.
    """

    def __init__(self, prior: AlignmentPrior, b: float) -> None:
        self.b = b
        mean, inverse = prior.mean[:, :3], prior.precision[:, :3, :3]
        density, linear = _log_density(mean, inverse)
        density[:, -1] += prior.log_scale
        rest, _ = _log_density(prior.mean[:, 3:], prior.precision[:, 3:, 3:])
        cross = so3.CROSS.to(mean)
        zeros = mean.new_zeros
        curvature = torch.einsum("iab,jdc,kbc->kadij", cross, cross, inverse).flatten(3).flatten(1, 2)
        square = torch.einsum("iab,kbc->kaci", cross, inverse).flatten(1, 2)
        first = -torch.einsum("iab,kb->kai", cross, linear)
        classes = len(mean)
        normal = torch.cat(
            [
                torch.cat([curvature, zeros(classes, 4, 9)], 1),
                torch.cat([square, first, zeros(classes, 1, 3)], 1),
            ],
            2,
        )
        axis = F.normalize(prior.mean[prior.seen, :3].mean(0), dim=0)
        arrays = density.T, rest.T, normal.flatten(0, 1), 1 / prior.spread, prior.log_scale
        self.density, self.rest, self.normal, self.precision, self.log_scale = (t.numpy(force=True) for t in arrays)
        self.log_odds = _log_odds(self.precision)
        self.starts = _starts(axis)

    def __call__(self, cells: tuple[Tensor, Tensor], last: Tensor, full: bool = True) -> Tensor:
        """Rotations ``[U, 4]`` with the largest objective among those found; the identity is a candidate.

        A full search starts from rotations all over SO(3), another one from the last rotation only.
        """
        parts = zip(cells[0].split(CHUNK), cells[1].split(CHUNK), last.split(CHUNK), strict=True)
        found = [self._best(n.numpy(force=True), z.numpy(force=True), q.numpy(force=True), full) for n, z, q in parts]
        return torch.from_numpy(np.concatenate(found)).to(last)

    def _best(self, n: Array, z: Array, last: Array, full: bool) -> Array:
        grid = np.broadcast_to(self.starts.numpy(force=True), (len(n), *self.starts.shape))
        identity, starts = grid[:, :1], last[:, None]
        if full:
            near = self._refine(n, z, grid, steps=1)
            best = np.argsort(-self._objective(n, z, near), 1)[:, :KEPT]
            starts = np.concatenate([np.take_along_axis(near, best[..., None], 1), starts], 1)
        found = np.concatenate([identity, self._refine(n, z, starts)], 1)
        objective = self._objective(n, z, found)
        objective[:, 0] += MARGIN
        return found[np.arange(len(n)), objective.argmax(1)]

    def refine(self, n: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Rotations after steps from rotations ``[U, S, 4]``; cells as in `__call__`."""
        return torch.from_numpy(self._refine(n.numpy(force=True), z.numpy(force=True), q.numpy(force=True))).to(q)

    def _refine(self, n: Array, z: Array, q: Array, steps: int = STEPS) -> Array:
        rest = self._log_rest(z)
        weight = (n / self.b)[:, None, :, None]
        for _ in range(steps):
            joint, features = self._densities(z, rest, q)
            p = np.exp(joint - joint.max(-1, keepdims=True))
            p *= weight / p.sum(-1, keepdims=True)
            statistics = p.swapaxes(-1, -2) @ features
            equations = statistics.reshape(*q.shape[:2], -1) @ self.normal
            vector = so3.to_vector(q)
            precision = self.precision * np.exp(-np.logaddexp(0, -self._prior_odds(vector)))[..., None]
            curvature = equations[..., :9].reshape(*q.shape[:2], 3, 3) + precision[..., None] * EYE
            # Without gravity and without a prior, no direction is determined.
            ridge = 1e-12 * (1 + curvature.max((-2, -1), keepdims=True)) * EYE
            slope = -equations[..., 9:] - precision * vector
            step = np.linalg.solve(curvature + ridge, slope[..., None])[..., 0]
            length = (step**2).sum(-1, keepdims=True) ** 0.5
            q = so3.multiply(so3.from_vector(step * (LONGEST / length.clip(LONGEST))), q)
            if length.max() < CONVERGED:
                break
        return q

    def objective(self, n: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Penalized log-likelihood J ``[U, S]`` of rotations ``[U, S, 4]``; cells as in `__call__`."""
        return torch.from_numpy(self._objective(*(t.numpy(force=True) for t in (n, z, q)))).to(n)

    def _objective(self, n: Array, z: Array, q: Array) -> Array:
        penalty = np.logaddexp(0, self.log_odds) - np.logaddexp(0, self._prior_odds(so3.to_vector(q)))
        return cast("Array", self._likelihood(n, z, q) - penalty)

    def _prior_odds(self, vector: Array) -> Array:
        """Prior log odds ``[...]`` of a device worn as usual against one worn in any way, for vectors ``[..., 3]``."""
        return cast("Array", self.log_odds - 0.5 * (vector**2 * self.precision).sum(-1))

    def likelihood(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """The objective ``[U, S]`` without its penalty, of rotations ``[U, S, 4]``."""
        arrays = (t.numpy(force=True) for t in (n, z, value))
        return torch.from_numpy(self._likelihood(*arrays)).to(n)

    def _likelihood(self, n: Array, z: Array, q: Array) -> Array:
        joint, _ = self._densities(z, self._log_rest(z), q)
        return cast("Array", (_log_sum(joint) * n[:, None]).sum(-1) / self.b)

    def bound(self, n: Tensor, z: Tensor) -> Tensor:
        """An upper bound ``[U]`` of the objective: gravity is at the mean of each class."""
        joint = self._log_rest(z.numpy(force=True))[:, 0] + self.log_scale
        return torch.from_numpy((_log_sum(joint) * n.numpy(force=True)).sum(-1) / self.b).to(n)

    def _log_rest(self, z: Array) -> Array:
        """Log density ``[U, 1, M, K]`` of the values that a rotation does not change, without constants."""
        return cast("Array", (_features(z[..., 3:]) @ self.rest)[:, None])

    def _densities(self, z: Array, rest: Array, q: Array) -> tuple[Array, Array]:
        """Log densities ``[U, S, M, K]`` and features ``[U, S, M, 13]`` of the turned cells."""
        features = _features(z[:, None, :, :3] @ so3.to_matrix(q).swapaxes(-1, -2))
        return features @ self.density + rest, features


def _log_sum(x: Array) -> Array:
    """Logarithm of the sum of exponentials over the last axis."""
    top = x.max(-1)
    return cast("Array", top + np.log(np.exp(x - top[..., None]).sum(-1)))


def _features(q: Array) -> Array:
    """The features ``[..., D * D + D + 1]`` of vectors ``[..., D]``: products, entries and 1."""
    dims = q.shape[-1]
    out = np.empty((*q.shape[:-1], dims * dims + dims + 1))
    square = out[..., : dims * dims].reshape(*q.shape, dims)
    np.multiply(q[..., :, None], q[..., None, :], out=square)
    out[..., dims * dims : -1], out[..., -1] = q, 1.0
    return out


def _log_density(mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of the features in the Gaussian log densities ``[K, D * D + D + 1]``, and their linear part."""
    linear = (inverse @ mean[:, :, None])[:, :, 0]
    constant = -0.5 * (mean * linear).sum(1)
    return torch.cat([-0.5 * inverse.flatten(1), linear, constant[:, None]], 1), linear


def _log_odds(precision: Array) -> float:
    """Log odds at the identity of a device worn as usual, with precisions ``[3]``, against one worn in any way."""
    log_density = 0.5 * float(np.log(precision.clip(1e-12)).sum()) - 1.5 * math.log(2 * math.pi)
    return log_density + math.log(8 * math.pi**2) + math.log((1 - OTHERWISE) / OTHERWISE)


def _starts(axis: Tensor) -> Tensor:
    """The 24 rotations ``[24, 4]`` of a cube with a face along ``axis`` ``[3]``; the identity is the first.

    Any rotation is within 63 degrees of one of them.
    """
    half = 0.5**0.5
    turns = torch.tensor([[1.0, 0, 0, 0], [half, half, 0, 0], [0, 1, 0, 0], [half, -half, 0, 0]]).to(axis)
    tilts = [
        [1.0, 0, 0, 0],
        [half, 0, half, 0],
        [0, 0, 1, 0],
        [half, 0, -half, 0],
        [half, 0, 0, half],
        [half, 0, 0, -half],
    ]
    cube = so3.multiply(torch.tensor(tilts).to(axis)[:, None], turns).flatten(0, 1)
    first = torch.eye(3).to(axis)[0]
    # The shortest rotation from the first axis to ``axis``; half a turn if they are opposite.
    frame = torch.cat([1 + first @ axis[:, None], torch.linalg.cross(first, axis)])
    frame = F.normalize(frame, dim=0) if float(frame.norm()) > 1e-6 else torch.eye(4).to(axis)[2]
    inverse = frame * torch.tensor([1.0, -1, -1, -1]).to(axis)
    starts = so3.multiply(so3.multiply(frame, cube), inverse)
    starts[0] = cube[0]  # exact
    return starts
