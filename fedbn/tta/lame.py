r"""LAME: smooth the predictions of a block over nearest neighbors; the network stays unchanged.

Maximum likelihood with a Laplacian term, by fixed-point steps from the network's own predictions,

.. math:: Y\leftarrow\mathrm{softmax}\Big(\log p+\sum_j w_{ij}Y_j\Big),

:math:`w_{ij}=1` for the nearest neighbors of window :math:`i` in feature space. Works very well if neighbors in time
share a label, and is harmful if they do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.tta.base import Method, Step, features_of

MAX_STEPS = 100
"""Maximum number of fixed-point steps; the energy converges in far fewer."""


@dataclass(frozen=True)
class Lame(Method):
    """Has no state between blocks.

    Attributes:
        neighbors: neighbors of each window in its block.

    >>> Lame().neighbors
    5
    """

    name = "lame"
    about = "Laplacian smoothing of a block's predictions, network unchanged"
    source = "Boudiaf et al. 2022, https://arxiv.org/abs/2201.05718"
    includes_current = True
    needs = "class probabilities, which it smooths"
    block: int = 64
    neighbors: int = 5

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        _, features = features_of(model)

        def step(x: Tensor) -> Tensor:
            with torch.no_grad():
                logp = model(x).log_softmax(1)
            return laplacian_smoothing(logp, nearest_neighbors(features(), self.neighbors))

        return step


def nearest_neighbors(features: Tensor, neighbors: int) -> Tensor:
    """Affinities ``[n, n]``: 1 if j is one of i's nearest by cosine similarity, else 0. The diagonal is 0.

    >>> nearest_neighbors(torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), 1).argmax(1).tolist()
    [1, 0, 1]
    """
    n = len(features)
    unit = F.normalize(features.flatten(1), dim=1)
    # Not by cdist: rounding in its expansion may rank a duplicate of a row before the row itself.
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    selected = similarity.topk(min(neighbors, n - 1), dim=1).indices
    return torch.zeros(n, n, dtype=features.dtype, device=features.device).scatter_(1, selected, 1.0)


def laplacian_smoothing(logp: Tensor, affinity: Tensor) -> Tensor:
    """Log-probabilities ``[n, K]`` after smoothing by affinities ``[n, n]``.

    >>> logp = torch.randn(3, 4).log_softmax(1)
    >>> bool(torch.equal(laplacian_smoothing(logp, torch.zeros(3, 3)), logp.log_softmax(1)))
    True
    """
    y = logp.log_softmax(1)
    for _ in range(MAX_STEPS):
        new = (logp + affinity @ y.exp()).log_softmax(1)
        if torch.allclose(new.exp(), y.exp(), atol=1e-7, rtol=0):
            return new
        y = new
    return y
