"""Augmentation of images ``[channels, height, width]``; targets with positions move with their image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.augment.base import Augmentation, Batch
from fedbn.errors import UserError


def _require_images(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise UserError(
            f"augmentation {name!r} works on images [channels, height, width], not on examples of shape "
            f"{list(x.shape[1:])}; for sensors use jitter or rotate"
        )


@dataclass(frozen=True)
class Flip(Augmentation):
    """Flips an image from left to right.

    Attributes:
        p: probability.

    >>> x, _ = Flip(p=1.0)(torch.arange(3.0).view(1, 1, 1, 3), torch.zeros(1), torch.Generator())
    >>> x.flatten().tolist()
    [2.0, 1.0, 0.0]
    """

    name = "flip"
    about = "images flipped from left to right; option p"
    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UserError(f"flip: p must be from 0 to 1, not {self.p:g}")

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        _require_images(self.name, x)
        chosen = (torch.rand(len(x), generator=generator) < self.p).to(x.device)

        def flipped(t: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (t.dim() - 1)), t.flip(-1), t)

        return flipped(x), flipped(y) if y.dim() >= 3 else y


@dataclass(frozen=True)
class Translate(Augmentation):
    """Moves an image by whole pixels; its border is repeated.

    Attributes:
        pixels: largest distance along each axis.

    >>> x, _ = Translate(pixels=1)(torch.rand(2, 1, 4, 4), torch.zeros(2), torch.Generator())
    >>> x.shape
    torch.Size([2, 1, 4, 4])
    """

    name = "translate"
    about = "images moved by whole pixels; option pixels"
    pixels: int = 2

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise UserError(f"translate: pixels must be at least 1, not {self.pixels}")

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        _require_images(self.name, x)
        moves = torch.randint(2 * self.pixels + 1, (len(x), 2), generator=generator).tolist()

        def moved(t: Tensor) -> Tensor:
            height, width = t.shape[-2:]
            rows, columns = (torch.arange(n, device=t.device) for n in (height, width))
            return torch.stack(
                [
                    own[..., (rows + dy - self.pixels).clamp(0, height - 1), :][
                        ..., (columns + dx - self.pixels).clamp(0, width - 1)
                    ]
                    for own, (dy, dx) in zip(t, moves, strict=True)
                ]
            )

        return moved(x), moved(y) if y.dim() >= 3 else y
