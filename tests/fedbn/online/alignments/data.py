"""Windows of a synthetic device: gravity by posture, and motion by activity."""

from __future__ import annotations

import torch

from fedbn.online.alignments import quaternions as so3

TRIPLES = ((0, 1, 2), (3, 4, 5))
GRAVITY = torch.tensor([[1.0, 0.0, 0.1], [0.9, 0.1, 0.4], [0.0, -0.2, 1.0], [0.2, 0.95, 0.1]])
MOTION = torch.tensor([0.3, 0.02, 0.02, 0.1])
CLASSES = len(GRAVITY)


def turn(x, q):
    """Windows turned by a rotation."""
    return torch.einsum("ij,nkjt->nkit", so3.to_matrix(q).to(x), x.unflatten(1, (-1, 3))).flatten(1, 2)


def windows(n, seed, *, q=None, gravity=GRAVITY, labels=None):
    """``n`` windows ``[n, 6, 24]`` and their labels, in stretches of 6 of one class."""
    draw = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) // 6) % CLASSES if labels is None else labels
    tilt = gravity[y] + 0.03 * torch.randn(n, 3, generator=draw)
    motion = MOTION[y, None, None] * torch.randn(n, 6, 24, generator=draw)
    x = motion + torch.cat([tilt, torch.zeros(n, 3)], 1)[:, :, None]
    return (x if q is None else turn(x, q)), y


def clients(count=6, spread=0.2, **options):
    """Windows and labels of several clients, each with its own rotation."""
    draw = torch.Generator().manual_seed(99)
    turns = so3.from_vector(spread * torch.randn(count, 3, generator=draw))
    return [windows(96, 100 + i, q=q, **options) for i, q in enumerate(turns)]


def angle(p, q):
    """Angle between two rotations in degrees."""
    inverse = q.double() * torch.tensor([1.0, -1, -1, -1], dtype=torch.float64)
    return float(so3.to_vector(so3.multiply(p.double(), inverse)).norm().rad2deg())
