r"""Tests on the windows of a user: the evidence for an alignment, and a change of the device.

The *evidence* is a log likelihood ratio of the alignment against the identity. It is prequential (Dawid, 1984,
*Statistical theory: the prequential approach*): each window is judged by the parameters before it, so that it is not
optimistic. It forgets, and b windows count as one independent window:

.. math:: \ell_t=\log\frac{\sum_k N(\theta_{t-1}z_t;\mu_k,\Sigma_k)}{\sum_k N(z_t;\mu_k,\Sigma_k)},\qquad
          L_t=e^{-1/50}L_{t-1}+\tfrac1b\operatorname{clip}(\ell_t,-10,10).

A negative value says that the user's windows fit the seen clients better without the alignment. It needs no labels. It
cannot show that an alignment changes the meaning of windows that fit well in both ways.

A *change* is a generalized likelihood ratio. It compares the transformation of all windows so far, :math:`\theta`, with
the best one for the last W windows alone, :math:`\theta'`, with the prior of the latter: the device has changed if
:math:`J_W(\theta')-\ell_W(\theta)` is above `CHANGED`, where :math:`\ell` is J without its penalty.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedbn.online.alignments.base import Search
from fedbn.online.alignments.cells import Array

LARGEST = 10.0
"""Largest log likelihood ratio of one window, in nats, so that a single strange window does not decide."""

FOR = math.log(20)
"""Evidence for an alignment, in nats per independent window, from which it is used: odds of 20 to 1."""

AGAINST = math.log(20)
"""Evidence against an alignment, in nats per independent window, from which it is rejected: odds of 20 to 1."""

EVIDENCE_MEMORY = 50.0
"""Windows after which the weight of a window in the evidence has fallen to 1/e."""

CHANGED = math.log(1e4)
"""Evidence for a change of the device, in nats per independent window, from which a user starts again.

It outweighs the prior odds of a change that happens once in ten thousand windows, hours of recording.
"""


def log_ratios(search: Search, b: float, identity: Array, value: Array, z: Tensor) -> Array:
    """Clipped log likelihood ratios ``[U]`` of windows ``[U, D]`` under parameters ``[U, P]``, divided by b.

    Args:
        search: of the alignment.
        b: successive windows that count as one independent window.
        identity: parameters ``[P]`` of the identity.
        value: parameters of each window.
        z: summaries.
    """
    moved = (value != identity).any(1)
    if not moved.any():
        return np.zeros(len(z))
    values = torch.from_numpy(np.stack([value, np.broadcast_to(identity, value.shape)], 1)).to(z)
    found = search.likelihood(z.new_ones(len(z), 1), z[:, None], values).numpy(force=True)
    limit = LARGEST / b
    return np.where(moved, (found[:, 0] - found[:, 1]).clip(-limit, limit), 0.0)


def changes(search: Search, recent: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the device of each user ``[U]`` has changed, and the parameters of the last windows ``[U, P]``.

    Args:
        search: of the alignment.
        recent: summaries of the last windows ``[U, W, D]``, float64.
        value: parameters of all windows so far ``[U, P]``, float64.
    """
    n = recent.new_ones(recent.shape[:2])
    now = search.likelihood(n, recent, value[:, None])[:, 0]
    # The search costs far more than the bound, which excludes a change for most windows. A little is for rounding.
    if not (search.bound(n, recent) - now > CHANGED - 1e-6).any():
        return torch.zeros_like(now, dtype=torch.bool), value
    found = search((n, recent), value)
    gain = search.objective(n, recent, found[:, None])[:, 0] - now
    return gain > CHANGED, found
