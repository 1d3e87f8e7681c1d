r"""Summaries of a stream in a fixed number of cells, whatever its length.

A cell has a weight :math:`n` and a mean :math:`z`. A new window becomes a cell of its own. If there is no free cell,
the two cells are merged whose union raises the sum of squared deviations least, by
:math:`\frac{n_i n_j}{n_i+n_j}\|z_i-z_j\|^2` (Ward, 1963, *Hierarchical grouping to optimize an objective function*).
Streams that have at most as many windows as there are cells are stored exactly. All functions are vectorized over
users. They are in NumPy, because calls of PyTorch take longer than these computations for a single user.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

Cells = tuple[Array, Array]
"""Weights ``[U, M]``, 0 for free cells, and means ``[U, M, D]``."""


def insert(cells: Cells, z: Array, weight: Array, scale: Array) -> Cells:
    """Cells after one more window per user.

    Args:
        cells: weights and means.
        z: ``[U, D]`` summaries of the windows.
        weight: ``[U]`` their weights.
        scale: ``[D]`` unit of each value in distances.

    >>> n, mean = insert((np.ones((1, 2)), np.array([[[0.0], [9.0]]])), np.ones((1, 1)), np.ones(1), np.ones(1))
    >>> n.tolist(), mean.flatten().tolist()
    ([[2.0, 1.0]], [0.5, 9.0])
    """
    n, mean = cells
    n = np.concatenate([n, weight[:, None].astype(n.dtype)], 1)
    return _merge_closest(n, np.concatenate([mean, z[:, None].astype(mean.dtype)], 1), scale)


def reduce(cells: Cells, size: int, scale: Array) -> Cells:
    """Merge cells until there are ``size``, or add free cells."""
    n, mean = cells
    missing = size - n.shape[1]
    if missing >= 0:
        return np.pad(n, ((0, 0), (0, missing))), np.pad(mean, ((0, 0), (0, missing), (0, 0)))
    n, mean = n.copy(), mean.copy()
    for _ in range(-missing):
        n, mean = _merge_closest(n, mean, scale)
    return n, mean


@lru_cache(maxsize=8)
def _below(size: int) -> Array:
    """Infinity on and below the diagonal, so that each pair counts once."""
    return np.tril(np.full((size, size), np.inf))


def _merge_closest(n: Array, mean: Array, scale: Array) -> tuple[Array, Array]:
    """Merge the two closest cells; the last cell takes the free place. A free cell is at distance 0 of any other."""
    users, size = n.shape
    row = np.arange(users)
    if (n[:, :-1] == 0).any(1).all():
        j = (n[:, :-1] == 0).argmax(1)
    else:
        scaled = (mean / scale).astype(np.float64, copy=False)
        square = (scaled * scaled).sum(-1)
        distance = square[:, :, None] + square[:, None] - 2 * (scaled @ scaled.swapaxes(1, 2))
        total = n[:, :, None] + n[:, None]
        cost = n[:, :, None] * n[:, None] / np.maximum(total, 1e-30) * np.maximum(distance, 0)
        i, j = np.divmod((cost + _below(size)).reshape(users, -1).argmin(1), size)
        joint = n[row, i] + n[row, j]
        share = (n[row, j] / np.maximum(joint, 1e-30))[:, None]
        mean[row, i] += share * (mean[row, j] - mean[row, i])
        n[row, i] = joint
    n[row, j], mean[row, j] = n[:, -1], mean[:, -1]
    return n[:, :-1], mean[:, :-1]
