"""Rotations as unit quaternions ``[..., 4]``, real part first, which have no singular angle.

Functions take tensors or NumPy arrays, which are several times as fast if they are small, and return the same.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor


def _table(shape: tuple[int, ...], entries: str) -> Tensor:
    """Integer table from ``index value`` pairs, as one matrix product is faster than many products of entries."""
    out = torch.zeros(shape, dtype=torch.float64)
    for entry in entries.split():
        sign, index = (-1, entry[1:]) if entry[0] == "-" else (1, entry)
        out[tuple(map(int, index))] += sign
    return out


PRODUCT = _table((4, 4, 4), "000 -110 -220 -330 011 101 231 -321 022 202 312 -132 033 303 123 -213").reshape(16, 4)
"""Coefficients ``[16, 4]`` of the quaternion product in the products of entries."""

MATRIX = _table(
    (4, 4, 3, 3),
    "0000 1100 -2200 -3300 1201 1201 -0301 -0301 1302 1302 0202 0202 "
    "1210 1210 0310 0310 0011 -1111 2211 -3311 2312 2312 -0112 -0112 "
    "1320 1320 -0220 -0220 2321 2321 0121 0121 0022 -1122 -2222 3322",
).reshape(16, 9)
"""Coefficients ``[16, 9]`` of the rotation matrix."""

CROSS = _table((3, 3, 3), "012 120 201 -021 -102 -210")
"""Coefficients ``[3, 3, 3]`` of the cross product: entry i of u x v is the sum over a, b of this times u_a v_b."""


Array = TypeVar("Array", Tensor, np.ndarray)


def _module(x: Array) -> Any:
    """The module with the functions for an array."""
    return np if isinstance(x, np.ndarray) else torch


def _like(table: Tensor, x: Array) -> Array:
    return table.numpy() if isinstance(x, np.ndarray) else table.to(x)


def _norm(x: Array) -> Array:
    return (x * x).sum(-1)[..., None] ** 0.5


def _products(p: Array, q: Array) -> Array:
    product = p[..., :, None] * q[..., None, :]
    return product.reshape(*product.shape[:-2], 16)


def multiply(p: Array, q: Array) -> Array:
    """The rotation that applies ``q``, then ``p``; normalized."""
    product = _products(p, q) @ _like(PRODUCT, p)
    return product / _norm(product)


def from_vector(vector: Array) -> Array:
    """Quaternion of a rotation vector ``[..., 3]`` (axis times angle in radians).

    >>> from_vector(torch.zeros(3))
    tensor([1., 0., 0., 0.])
    """
    xp, half = _module(vector), _norm(vector) / 2
    return xp.concatenate([xp.cos(half), vector / 2 * xp.sinc(half / torch.pi)], -1)


def to_vector(q: Array) -> Array:
    """Rotation vector ``[..., 3]`` with an angle of at most pi.

    >>> to_vector(from_vector(torch.tensor([0.0, 0.0, 3.0])))
    tensor([0., 0., 3.])
    """
    xp = _module(q)
    q = xp.where(q[..., :1] < 0, -q, q)
    sine = _norm(q[..., 1:])
    factor = 2 * xp.arctan2(sine, q[..., :1]) / xp.clip(sine, 1e-30, 2)
    return xp.where(sine > 0, factor, 2.0) * q[..., 1:]


def to_matrix(q: Array) -> Array:
    """Rotation matrix ``[..., 3, 3]``; exactly the identity for the identity."""
    return (_products(q, q) @ _like(MATRIX, q)).reshape(*q.shape[:-1], 3, 3)


def from_matrix(matrix: Tensor) -> Tensor:
    """Quaternion of a rotation matrix ``[3, 3]``: the main axis of a symmetric form (Bar-Itzhack, 2000)."""
    m = matrix
    form = torch.zeros(4, 4, dtype=m.dtype)
    form[0, 0] = m.trace()
    form[0, 1:] = form[1:, 0] = torch.stack([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    form[1:, 1:] = m + m.T - m.trace() * torch.eye(3, dtype=m.dtype)
    return torch.linalg.eigh(form)[1][:, -1]
