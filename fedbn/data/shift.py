"""Synthetic feature shift for any scenario: one random draw per user, unseen users included.

``rotation:strength=0.6,gain:strength=0.2`` rotates every user's sensor and then scales its channels. A user's training
and test data are shifted in the same way. The unit of ``strength`` depends on the shift. Draws are keyed by seed, shift
and user name, so that the shift of a user does not depend on the other users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbn.data.population import Examples, Population
from fedbn.errors import UserError
from fedbn.nn.batchnorm import along
from fedbn.plugins import parse, render
from fedbn.seeds import generator

Apply = Callable[[Tensor], Tensor]


class Shift(ABC):
    """A kind of feature shift; its fields are its options.

    Attributes:
        name: name on the command line.
        about: one-line description, with the unit of ``strength``.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        """Draw the shift of one user.

        Args:
            shape: shape of one example, channels first.
            scale: standard deviation of each channel over the population, ``[channels]``.
            rng: random generator of the user.
        """


@dataclass(frozen=True)
class Gain(Shift):
    """Scale each channel by exp(N(0, strength))."""

    name = "gain"
    about = "each channel scaled by exp(N(0, strength))"
    strength: float = 0.2

    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        factor = torch.exp(torch.randn(shape[0], generator=rng) * self.strength)
        return lambda x: x * along(factor, x)


@dataclass(frozen=True)
class Offset(Shift):
    """Add N(0, strength) standard deviations to each channel."""

    name = "offset"
    about = "each channel moved by N(0, strength) of its standard deviation"
    strength: float = 0.3

    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        offset = torch.randn(shape[0], generator=rng) * self.strength * scale
        return lambda x: x + along(offset, x)


@dataclass(frozen=True)
class Noise(Shift):
    """Add fixed white noise with a level drawn from [0, strength] standard deviations."""

    name = "noise"
    about = "white noise, level uniform in [0, strength] standard deviations"
    strength: float = 0.5

    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        level = torch.rand((), generator=rng) * self.strength
        return lambda x: x + torch.randn(x.shape, generator=rng) * level * along(scale, x)


@dataclass(frozen=True)
class Rotation(Shift):
    """Rotate every triple of channels about a random axis by an angle N(0, strength) in radians."""

    name = "rotation"
    about = "3-axis sensors turned about a random axis by N(0, strength) radians"
    strength: float = 0.6

    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        if len(shape) != 2 or shape[0] % 3:
            raise UserError(
                f"shift 'rotation' works on 3-axis sensors: windows [3k, length], not examples of shape {list(shape)}; "
                "for images use contrast, inversion, blur or color"
            )
        axis = F.normalize(torch.randn(3, generator=rng), dim=0)
        return rotate(axis, torch.randn((), generator=rng) * self.strength)


def rotate(axis: Tensor, angle: Tensor) -> Apply:
    """Rotation of every triple of channels of windows ``[n, 3k, length]``.

    Args:
        axis: unit vector ``[3]``.
        angle: angle in radians.

    >>> quarter = rotate(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(torch.pi / 2))
    >>> quarter(torch.tensor([[[1.0], [0.0], [5.0]]])).round().add(0).flatten().tolist()
    [0.0, 1.0, 5.0]
    """
    x, y, z = axis.tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    matrix = torch.linalg.matrix_exp(angle * cross)

    def apply(data: Tensor) -> Tensor:
        triples = data.unflatten(1, (-1, 3))
        return torch.einsum("ij,nkjt->nkit", matrix, triples).flatten(1, 2)

    return apply


@dataclass(frozen=True)
class Placement(Shift):
    """Another placement on the body: a rotation, plus a gain and an offset of a third of its strength."""

    name = "placement"
    about = "another place on the body: rotation (radians) with gain and offset"
    strength: float = 0.6

    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        parts = [Rotation(self.strength), Gain(self.strength / 3), Offset(self.strength / 3)]
        steps = [part.draw(shape, scale, rng) for part in parts]
        return lambda x: _apply_all(steps, x)


class _Image(Shift):
    """Base class of shifts for images only; values are in [-1, 1]."""

    def draw(self, shape: tuple[int, ...], scale: Tensor, rng: torch.Generator) -> Apply:
        if len(shape) != 3:
            raise UserError(
                f"shift {self.name!r} works on images [channels, height, width], not on examples of shape "
                f"{list(shape)}; for sensors use gain, offset, noise, rotation or placement"
            )
        return self.draw_image(shape, rng)

    @abstractmethod
    def draw_image(self, shape: tuple[int, ...], rng: torch.Generator) -> Apply:
        """Draw the shift of one user's images."""


@dataclass(frozen=True)
class Contrast(_Image):
    """Scale values by exp(-|N(0, strength)|)."""

    name = "contrast"
    about = "contrast lowered by exp(-|N(0, strength)|)"
    strength: float = 1.0

    def draw_image(self, shape: tuple[int, ...], rng: torch.Generator) -> Apply:
        factor = torch.exp(-(torch.randn((), generator=rng) * self.strength).abs())
        return lambda x: x * factor


@dataclass(frozen=True)
class Inversion(_Image):
    """Invert the images of a fraction ``strength`` of the users."""

    name = "inversion"
    about = "light and dark exchanged for a share strength of users"
    strength: float = 0.5

    def draw_image(self, shape: tuple[int, ...], rng: torch.Generator) -> Apply:
        inverted = bool(torch.rand((), generator=rng) < self.strength)
        return lambda x: -x if inverted else x


@dataclass(frozen=True)
class Blur(_Image):
    """Gaussian blur with a width drawn from [0, strength] pixels."""

    name = "blur"
    about = "Gaussian blur, width uniform in [0, strength] pixels"
    strength: float = 1.5

    def draw_image(self, shape: tuple[int, ...], rng: torch.Generator) -> Apply:
        width = float(torch.rand((), generator=rng)) * self.strength
        if width < 1e-3:
            return lambda x: x
        radius = max(1, min(round(3 * width), min(shape[1:]) - 1))
        weights = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * width**2))
        kernel = (weights / weights.sum()).expand(shape[0], 1, -1)

        def apply(x: Tensor) -> Tensor:
            x = F.pad(x, (radius, radius, radius, radius), mode="replicate")
            x = F.conv2d(x, kernel[:, :, None, :], groups=shape[0])
            return F.conv2d(x, kernel[:, :, :, None], groups=shape[0])

        return apply


@dataclass(frozen=True)
class Color(_Image):
    """Mix channels by the identity plus N(0, strength)."""

    name = "color"
    about = "channels mixed by identity + N(0, strength)"
    strength: float = 0.3

    def draw_image(self, shape: tuple[int, ...], rng: torch.Generator) -> Apply:
        mix = torch.eye(shape[0]) + torch.randn(shape[0], shape[0], generator=rng) * self.strength
        return lambda x: torch.einsum("ij,njhw->nihw", mix, x)


def shifts() -> dict[str, type[Shift]]:
    """All shifts, by name."""
    kinds: list[Any] = [Gain, Offset, Noise, Rotation, Placement, Contrast, Inversion, Blur, Color]
    return {k.name: k for k in kinds}


def _parse_all(text: str) -> list[Shift]:
    kinds = [parse(part, "shift", shifts()) for part in text.split(",") if part.strip()]
    for i, kind in enumerate(kinds):
        if (strength := getattr(kind, "strength", 0.0)) < 0:
            raise UserError(f"shift {kind.name!r}: strength must not be negative, but is {strength}")
        # Draws are keyed by name, so both would draw the same numbers.
        if kind.name in (k.name for k in kinds[:i]):
            raise UserError(f"shift {kind.name!r} is given twice: use one with a larger strength")
    return kinds


def parse_shift(text: str) -> str:
    """Canonical (shortest) form of the shifts in ``text``.

    >>> parse_shift("rotation:strength=0.6,gain:strength=0.1")
    'rotation,gain:strength=0.1'

    Raises:
        UserError: if a shift or an option is unknown, a shift is repeated, or a strength is negative.
    """
    return ",".join(render(kind) for kind in _parse_all(text))


def _apply_all(steps: list[Apply], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _shifted(data: Examples, steps: list[Apply]) -> Examples:
    return replace(data, x=_apply_all(steps, data.x).contiguous())


def shift(population: Population, text: str, seed: int) -> Population:
    """Shift the training and test data of every user.

    Args:
        population: users as loaded or partitioned.
        text: shifts separated by commas; empty for none.
        seed: seed of the run.

    Raises:
        UserError: if a shift does not apply to the data; as `parse_shift`.
    """
    kinds = _parse_all(text)
    if not kinds:
        return population
    sample = torch.cat([u.train.x[:200] for u in population.users])
    scale = sample.transpose(0, 1).flatten(1).std(1)
    users = []
    for user in population.users:
        steps = [k.draw(population.shape, scale, generator(seed, "shift", k.name, user.name)) for k in kinds]
        train, test = (_shifted(part, steps) for part in (user.train, user.test))
        validation, stream = (part and _shifted(part, steps) for part in (user.validation, user.stream))
        users.append(replace(user, train=train, test=test, validation=validation, stream=stream))
    skew = f"{population.skew}; feature skew added by {parse_shift(text)}"
    return replace(population, users=tuple(users), skew=skew)
