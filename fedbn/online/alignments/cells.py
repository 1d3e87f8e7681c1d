r"""Summaries of a stream in a fixed number of cells, whatever its length.

A cell has a weight :math:`n` and a mean :math:`z`. A new window becomes a cell of its own. If there is no free cell,
the two cells are merged whose union raises the sum of squared deviations least, by
:math:`\frac{n_i n_j}{n_i+n_j}\|z_i-z_j\|^2` (Ward, 1963, *Hierarchical grouping to optimize an objective function*).
Streams that have at most as many windows as there are cells are stored exactly. All functions are vectorized over
users.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Cells = tuple[Tensor, Tensor]
"""Weights ``[U, M]``, 0 for free cells, and means ``[U, M, D]``."""


def insert(cells: Cells, z: Tensor, weight: Tensor, scale: Tensor) -> Cells:
    """Cells after one more window per user.

    Args:
        cells: weights and means.
        z: ``[U, D]`` summaries of the windows.
        weight: ``[U]`` their weights.
        scale: ``[D]`` unit of each value in distances.

    >>> n, mean = torch.tensor([[1.0, 1.0]]), torch.tensor([[[0.0], [9.0]]])
    >>> n, mean = insert((n, mean), torch.tensor([[1.0]]), torch.ones(1), torch.ones(1))
    >>> n.tolist(), mean.flatten().tolist()
    ([[2.0, 1.0]], [0.5, 9.0])
    """
    return _merge_closest((torch.cat([cells[0], weight[:, None]], 1), torch.cat([cells[1], z[:, None]], 1)), scale)


def reduce(cells: Cells, size: int, scale: Tensor) -> Cells:
    """Merge cells until there are ``size``, or add free cells."""
    n, mean = cells
    missing = size - n.shape[1]
    if missing > 0:
        n = torch.cat([n, n.new_zeros(len(n), missing)], 1)
        mean = torch.cat([mean, mean.new_zeros(len(n), missing, mean.shape[2])], 1)
    for _ in range(-missing):
        n, mean = _merge_closest((n, mean), scale)
    return n, mean


@lru_cache(maxsize=8)
def _below(size: int, device: torch.device) -> Tensor:
    """Infinity on and below the diagonal, so that each pair counts once."""
    return torch.full((size, size), torch.inf, dtype=torch.float64, device=device).tril()


def _merge_closest(cells: Cells, scale: Tensor) -> Cells:
    """Merge the two closest cells; the last cell takes the free place. A free cell is at distance 0 of any other."""
    n, mean = cells
    scaled = (mean / scale).double()
    square = scaled.square().sum(-1)
    distance = square[:, :, None] + square[:, None] - 2 * scaled @ scaled.mT
    cost = n[:, :, None] * n[:, None] / (n[:, :, None] + n[:, None]).clamp_min(1e-30) * distance.clamp_min(0)
    users, size = n.shape
    best = (cost + _below(size, n.device)).flatten(1).argmin(1)
    i, j, row = best // size, best % size, torch.arange(users, device=n.device)
    total = n[row, i] + n[row, j]
    share = (n[row, j] / total.clamp_min(1e-30))[:, None]
    n, mean = n.clone(), mean.clone()
    mean[row, i] = torch.lerp(mean[row, i], mean[row, j], share.to(mean))
    n[row, i] = total
    n[row, j], mean[row, j] = n[:, -1].clone(), mean[:, -1].clone()
    return n[:, :-1], mean[:, :-1]
