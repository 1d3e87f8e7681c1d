r"""Search for the rotation of a device: expectation maximization on the rotations SO(3).

With the mean accelerations :math:`g_t` and weights :math:`n_t` of the cells of a stream, a step (Dempster, Laird,
Rubin, 1977, https://doi.org/10.1111/j.2517-6161.1977.tb01600.x) with a Gauss-Newton step on the rotation as M step is

.. math::
    p_{tk} &\propto N(R g_t;\mu_k,S_k)\,N(e_t;m_k,V_k)\\
    R &\leftarrow \exp(\delta)R,\quad
    \delta=\arg\min_\delta\sum_{tk}\tfrac{n_t p_{tk}}{b}\|R g_t+\delta\times Rg_t-\mu_k\|^2_{S_k^{-1}}
      +\|\log R+\delta\|^2/s^2 .

The density of a class and, given :math:`p`, the normal equations are linear in :math:`\phi(q)=(qq^\top,q,1)` with
:math:`q=Rg`, so that a step is a few matrix products over all users, starts, cells and classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.online.alignments import quaternions as so3
from fedbn.online.alignments.base import MARGIN, AlignmentPrior
from fedbn.online.alignments.cells import Cells

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
        self.b, self.precision = b, 1 / prior.spread
        mean, inverse = prior.mean[:, :3], prior.precision[:, :3, :3]
        self.rest_mean, self.rest_inverse = prior.mean[:, 3:], prior.precision[:, 3:, 3:]
        linear = (inverse @ mean[:, :, None])[:, :, 0]
        constant = prior.log_scale - 0.5 * (mean * linear).sum(1)
        self.density = torch.cat([-0.5 * inverse.flatten(1), linear, constant[:, None]], 1).T
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
        self.normal = normal.flatten(0, 1)
        self.eye = torch.eye(3).to(mean)
        self.spread = self.precision.diag()
        axis = F.normalize(prior.mean[prior.seen, :3].mean(0), dim=0)
        angles = torch.arange(YAWS).to(axis) * (2 * math.pi / YAWS)
        self.starts = so3.from_vector(angles[:, None] * axis)

    def __call__(self, cells: Cells, last: Tensor) -> Tensor:
        """Rotations ``[U, 4]`` with the largest objective among those found; the identity is a candidate."""
        parts = zip(cells[0].split(CHUNK), cells[1].split(CHUNK), last.split(CHUNK), strict=True)
        return torch.cat([self._best(n, z, q) for n, z, q in parts])

    def _best(self, n: Tensor, z: Tensor, last: Tensor) -> Tensor:
        starts = torch.cat([self.starts.expand(len(n), -1, -1), last[:, None]], 1)
        found = torch.cat([starts[:, :1], self.refine(n, z, starts)], 1)
        objective = self.objective(n, z, found)
        objective[:, 0] += MARGIN
        return found[torch.arange(len(n), device=n.device), objective.argmax(1)]

    def refine(self, n: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Rotations after steps from rotations ``[U, S, 4]``; cells as in `__call__`."""
        rest = self._log_rest(z)
        weight = (n / self.b)[:, None, :, None]
        for _ in range(STEPS):
            joint, features = self._densities(z, rest, q)
            statistics = (joint.softmax(-1) * weight).mT @ features
            equations = statistics.flatten(2) @ self.normal
            vector = so3.to_vector(q)
            curvature = equations[..., :9].unflatten(-1, (3, 3)) + self.spread
            # Without gravity and without a prior, no direction is determined.
            ridge = 1e-12 * (1 + curvature.amax((-2, -1), keepdim=True)) * self.eye
            step = torch.linalg.solve(curvature + ridge, -equations[..., 9:] - self.precision * vector)
            length = step.norm(dim=-1, keepdim=True)
            q = so3.multiply(so3.from_vector(step * (LONGEST / length.clamp_min(LONGEST))), q)
            if float(length.max()) < CONVERGED:
                break
        return q

    def objective(self, n: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """Penalized log-likelihood J ``[U, S]`` of rotations ``[U, S, 4]``; cells as in `__call__`."""
        return self.likelihood(n, z, q) - 0.5 * (so3.to_vector(q).square() * self.precision).sum(-1)

    def likelihood(self, n: Tensor, z: Tensor, q: Tensor) -> Tensor:
        """The objective without its penalty."""
        joint, _ = self._densities(z, self._log_rest(z), q)
        return (joint.logsumexp(-1) * n[:, None]).sum(-1) / self.b

    def _log_rest(self, z: Tensor) -> Tensor:
        """Log density ``[U, 1, M, K]`` of the values that a rotation does not change, without constants."""
        d = z[:, :, None, 3:] - self.rest_mean
        return -0.5 * (d * (d[..., None, :] @ self.rest_inverse)[..., 0, :]).sum(-1)[:, None]

    def _densities(self, z: Tensor, rest: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``[U, S, M, K]`` and features ``[U, S, M, 13]`` of the turned cells."""
        turned = z[:, None, :, :3] @ so3.to_matrix(q).mT
        square = (turned[..., :, None] * turned[..., None, :]).flatten(-2)
        features = torch.cat([square, turned, torch.ones_like(turned[..., :1])], -1)
        return features @ self.density + rest, features
