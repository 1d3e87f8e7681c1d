"""Augmentation of sensor windows ``[channels, length]`` (Um et al., ICMI 2017, https://arxiv.org/abs/1706.00527)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.augment.base import Augmentation, Batch
from fedbn.errors import UserError


@dataclass(frozen=True)
class Jitter(Augmentation):
    """Adds white noise.

    Attributes:
        scale: standard deviation of the noise, in the unit of the data.

    >>> x, y = Jitter()(torch.zeros(2, 3, 8), torch.zeros(2), torch.Generator().manual_seed(0))
    >>> bool(x.std() < 0.1)
    True
    """

    name = "jitter"
    about = "white noise; option scale"
    scale: float = 0.05

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        return x + self.scale * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device), y


@dataclass(frozen=True)
class Rotate(Augmentation):
    """Rotates every triple of channels of a window about a random axis, as if the sensor were worn differently.

    Attributes:
        strength: standard deviation of the angle, in radians.

    >>> x, y = Rotate()(torch.ones(2, 3, 8), torch.zeros(2), torch.Generator().manual_seed(0))
    >>> torch.allclose(x.square().sum(1), torch.tensor(3.0))
    True
    """

    name = "rotate"
    about = "3-axis sensors turned about a random axis; option strength (radians)"
    strength: float = 0.3

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        if x.dim() != 3 or x.shape[1] % 3:
            raise UserError(
                f"augmentation 'rotate' works on 3-axis sensors: windows [3k, length], not examples of shape "
                f"{list(x.shape[1:])}; for images use flip or translate"
            )
        axes = F.normalize(torch.randn(len(x), 3, generator=generator, dtype=x.dtype), dim=1)
        angles = self.strength * torch.randn(len(x), 1, generator=generator, dtype=x.dtype)
        a, b, c = (angles * axes).T
        zero = torch.zeros_like(a)
        cross = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], 1).view(-1, 3, 3)
        rotation = torch.linalg.matrix_exp(cross).to(x.device)
        return torch.einsum("nij,nkjt->nkit", rotation, x.unflatten(1, (-1, 3))).flatten(1, 2), y
