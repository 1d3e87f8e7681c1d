"""Examples, users and populations of users."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.seeds import numpy_generator


@dataclass(frozen=True)
class Examples:
    """Labeled examples in recorded order.

    Attributes:
        x: ``[n, *shape]`` float32.
        y: ``[n]`` int64, class indices.
        recording: ``[n]`` int64, which recording of the user (or which source row group) a row is from.
    """

    x: Tensor
    y: Tensor
    recording: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Examples:
        """The rows ``index``, in that order."""
        return Examples(self.x[index], self.y[index], self.recording[index])

    def to(self, device: str | torch.device) -> Examples:
        """The same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device), self.recording.to(device))

    @staticmethod
    def concat(parts: Sequence[Examples]) -> Examples:
        """All parts, one after the other."""
        return Examples(
            torch.cat([p.x for p in parts]),
            torch.cat([p.y for p in parts]),
            torch.cat([p.recording for p in parts]),
        )


@dataclass(frozen=True)
class User:
    """One person, device or institution: what it trains on, and later recordings to test on."""

    name: str
    domain: str
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Population:
    """All users of a run.

    Attributes:
        users: seen and unseen ones, in an order that does not depend on the seed.
        unseen: indices of the users that never train; they only meet the finished model.
        classes: names of the classes, by index.
        skew: one sentence naming the skew between users (label, feature, quantity; natural or made).
        sources: file or package name -> sha256 of the data, part of a run's identity.
        remote: the users' data lie with them alone, and what is here stands in for data of that shape.
    """

    users: tuple[User, ...]
    unseen: tuple[int, ...]
    classes: tuple[str, ...]
    skew: str
    sources: dict[str, str] = field(default_factory=dict)
    remote: bool = False

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """Indices of the users that train."""
        away = set(self.unseen)
        return tuple(i for i in range(len(self.users)) if i not in away)

    def without(self, users: Collection[int]) -> Population:
        """The same population, had the users ``users`` not been there."""
        stay = [i for i in range(len(self.users)) if i not in users]
        unseen = tuple(new for new, old in enumerate(stay) if old in self.unseen)
        return replace(self, users=tuple(self.users[i] for i in stay), unseen=unseen)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.users[0].train.x.shape[1:])


def hold_out(users: int, unseen: int, seed: int, reserved: int = 0) -> tuple[int, ...]:
    """Which users are unseen: folds of one fixed shuffle, so that successive seeds hold out others.

    The ``reserved`` first of that shuffle, those whom the first seeds would hold out, are passed over.

    >>> sorted(hold_out(6, 2, 0) + hold_out(6, 2, 1) + hold_out(6, 2, 2))
    [0, 1, 2, 3, 4, 5]
    >>> hold_out(6, 2, 0, reserved=2) == hold_out(6, 2, 1)
    True
    """
    order = shuffled(users)[reserved:]
    if not 0 <= unseen < len(order):
        raise UserError(
            f"{unseen} unseen of {len(order)} users leaves nobody to train; choose 0 to {max(0, len(order) - 1)}"
        )
    return tuple(sorted(order[(seed * unseen + i) % len(order)] for i in range(unseen)))


def shuffled(users: int) -> list[int]:
    """The one order in which all seeds hold users out."""
    order: list[int] = numpy_generator(0, "unseen users").permutation(users).tolist()
    return order
