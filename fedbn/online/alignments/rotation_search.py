r"""Search for the rotation of a device: expectation maximization on the rotations SO(3).

With the mean accelerations :math:`g_t` and weights :math:`n_t` of the cells of a stream, a step (Dempster, Laird,
Rubin, 1977, https://doi.org/10.1111/j.2517-6161.1977.tb01600.x) with a Gauss-Newton step on the rotation as M step is

.. math::
    p_{tk} &\propto N(R g_t;\mu_k,S_k)\,N(e_t;m_k,V_k)\\
    R &\leftarrow \exp(\delta)R,\quad
    \delta=\arg\min_\delta\sum_{tk}\tfrac{n_t p_{tk}}{b}\|R g_t+\delta\times Rg_t-\mu_k\|^2_{S_k^{-1}}
      +\|\log R+\delta\|^2/s^2 .

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

YAWS = 6
"""Rotations about gravity from which the search starts."""

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
        angles = torch.arange(YAWS).to(axis) * (2 * math.pi / YAWS)
        arrays = density.T, rest.T, normal.flatten(0, 1), 1 / prior.spread
        self.density, self.rest, self.normal, self.precision = (t.numpy(force=True) for t in arrays)
        self.diagonal = np.diag(self.precision)
        self.starts = so3.from_vector(angles[:, None] * axis)

    def __call__(self, cells: tuple[Tensor, Tensor], last: Tensor, full: bool = True) -> Tensor:
        """Rotations ``[U, 4]`` with the largest objective among those found; the identity is a candidate.

        A full search starts from all yaws, another one from the last rotation only.
        """
        parts = zip(cells[0].split(CHUNK), cells[1].split(CHUNK), last.split(CHUNK), strict=True)
        found = [self._best(n.numpy(force=True), z.numpy(force=True), q.numpy(force=True), full) for n, z, q in parts]
        return torch.from_numpy(np.concatenate(found)).to(last)

    def _best(self, n: Array, z: Array, last: Array, full: bool) -> Array:
        yaws = np.broadcast_to(self.starts.numpy(force=True), (len(n), YAWS, 4))
        identity, starts = yaws[:, :1], last[:, None]
        if full:
            starts = np.concatenate([yaws, starts], 1)
        found = np.concatenate([identity, self._refine(n, z, starts)], 1)
        objective = self._objective(n, z, found)
        objective[:, 0] += MARGIN
        return found[np.arange(len(n)), objective.argmax(1)]

    def refine(self, n: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Rotations after steps from rotations ``[U, S, 4]``; cells as in `__call__`."""
        return torch.from_numpy(self._refine(*(t.numpy(force=True) for t in (n, z, q)))).to(q)

    def _refine(self, n: Array, z: Array, q: Array) -> Array:
        rest = self._log_rest(z)
        weight = (n / self.b)[:, None, :, None]
        for _ in range(STEPS):
            joint, features = self._densities(z, rest, q)
            p = np.exp(joint - joint.max(-1, keepdims=True))
            p *= weight / p.sum(-1, keepdims=True)
            statistics = p.swapaxes(-1, -2) @ features
            equations = statistics.reshape(*q.shape[:2], -1) @ self.normal
            curvature = equations[..., :9].reshape(*q.shape[:2], 3, 3) + self.diagonal
            # Without gravity and without a prior, no direction is determined.
            ridge = 1e-12 * (1 + curvature.max((-2, -1), keepdims=True)) * EYE
            slope = -equations[..., 9:] - self.precision * so3.to_vector(q)
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
        penalty = 0.5 * (so3.to_vector(q) ** 2 * self.precision).sum(-1)
        return cast("Array", self._likelihood(n, z, q) - penalty)

    def likelihood(self, n: Tensor, z: Tensor, value: Tensor) -> Tensor:
        """The objective ``[U, S]`` without its penalty, of rotations ``[U, S, 4]``."""
        arrays = (t.numpy(force=True) for t in (n, z, value))
        return torch.from_numpy(self._likelihood(*arrays)).to(n)

    def _likelihood(self, n: Array, z: Array, q: Array) -> Array:
        joint, _ = self._densities(z, self._log_rest(z), q)
        top = joint.max(-1)
        total = top + np.log(np.exp(joint - top[..., None]).sum(-1))
        return cast("Array", (total * n[:, None]).sum(-1) / self.b)

    def _log_rest(self, z: Array) -> Array:
        """Log density ``[U, 1, M, K]`` of the values that a rotation does not change, without constants."""
        return cast("Array", (_features(z[..., 3:]) @ self.rest)[:, None])

    def _densities(self, z: Array, rest: Array, q: Array) -> tuple[Array, Array]:
        """Log densities ``[U, S, M, K]`` and features ``[U, S, M, 13]`` of the turned cells."""
        features = _features(z[:, None, :, :3] @ so3.to_matrix(q).swapaxes(-1, -2))
        return features @ self.density + rest, features


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
