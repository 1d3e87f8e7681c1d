"""Rotations as unit quaternions ``[..., 4]``, real part first, which have no singular angle."""

from __future__ import annotations

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


def _products(p: Tensor, q: Tensor) -> Tensor:
    return (p[..., :, None] * q[..., None, :]).flatten(-2)


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """The rotation that applies ``q``, then ``p``; normalized."""
    product = _products(p, q) @ PRODUCT.to(p)
    return product / product.norm(dim=-1, keepdim=True)


def from_vector(vector: Tensor) -> Tensor:
    """Quaternion of a rotation vector ``[..., 3]`` (axis times angle in radians).

    >>> from_vector(torch.zeros(3))
    tensor([1., 0., 0., 0.])
    """
    half = vector.norm(dim=-1, keepdim=True) / 2
    return torch.cat([half.cos(), vector / 2 * torch.sinc(half / torch.pi)], -1)


def to_vector(q: Tensor) -> Tensor:
    """Rotation vector ``[..., 3]`` with an angle of at most pi.

    >>> to_vector(from_vector(torch.tensor([0.0, 0.0, 3.0])))
    tensor([0., 0., 3.])
    """
    q = torch.where(q[..., :1] < 0, -q, q)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    factor = 2 * torch.atan2(sine, q[..., :1]) / sine.clamp_min(1e-30)
    return torch.where(sine > 0, factor, 2.0) * q[..., 1:]


def to_matrix(q: Tensor) -> Tensor:
    """Rotation matrix ``[..., 3, 3]``; exactly the identity for the identity."""
    return (_products(q, q) @ MATRIX.to(q)).unflatten(-1, (3, 3))


def from_matrix(matrix: Tensor) -> Tensor:
    """Quaternion of a rotation matrix ``[3, 3]``: the main axis of a symmetric form (Bar-Itzhack, 2000)."""
    m = matrix
    form = torch.zeros(4, 4, dtype=m.dtype)
    form[0, 0] = m.trace()
    form[0, 1:] = form[1:, 0] = torch.stack([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    form[1:, 1:] = m + m.T - m.trace() * torch.eye(3, dtype=m.dtype)
    return torch.linalg.eigh(form)[1][:, -1]
