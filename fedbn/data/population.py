"""Examples, users and populations of users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedbn.errors import UserError
from fedbn.seeds import numpy_generator


@dataclass(frozen=True)
class Examples:
    """Labeled examples in the order of recording.

    Attributes:
        x: ``[n, *shape]`` float32.
        y: targets ``[n, ...]``, such as class indices ``[n]`` int64 or real numbers ``[n]`` float32.
        recording: index of the user's recording (or source row group) of each row, ``[n]`` int64.
    """

    x: Tensor
    y: Tensor
    recording: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def has_classes(self) -> bool:
        """Whether each row has one class, its target."""
        return self.y.dim() == 1 and not self.y.is_floating_point()

    @property
    def groups(self) -> Tensor:
        """Group ``[n]`` of each row for splits: its class, or 0 if rows have no class."""
        return self.y if self.has_classes else torch.zeros(len(self), dtype=torch.int64, device=self.y.device)

    def take(self, index: Tensor) -> Examples:
        """Select the rows ``index``, in that order."""
        return Examples(self.x[index], self.y[index], self.recording[index])

    def to(self, device: str | torch.device) -> Examples:
        """Copy the examples to a device."""
        return Examples(self.x.to(device), self.y.to(device), self.recording.to(device))

    @staticmethod
    def concat(parts: Sequence[Examples]) -> Examples:
        """Concatenate examples."""
        return Examples(*(torch.cat([getattr(p, name) for p in parts]) for name in ("x", "y", "recording")))


@dataclass(frozen=True)
class User:
    """A user (a person, device or institution) with training data and a test set of later recordings.

    Attributes:
        name: name of the user.
        domain: group of users with similar data.
        train: training examples.
        test: test examples.
        validation: examples that the data set reserves for tuning; None if training examples are held out instead.
    """

    name: str
    domain: str
    train: Examples
    test: Examples
    validation: Examples | None = None


@dataclass(frozen=True)
class Population:
    """All users of a run.

    Attributes:
        users: seen and unseen users, in an order that does not depend on the seed.
        unseen: indices of the users that never train. They only evaluate the final model.
        classes: class names, by index; empty if the task has none.
        skew: one sentence that describes the skew between users (label, feature, quantity; natural or synthetic).
        sources: file or package name -> SHA-256 of the data; part of a run's identity.
        remote: whether the data are stored on the nodes only, and these examples are placeholders of the same shape.
        pooled: whether the data have no users, so that a partition has to make them from the rows of the only user.
        notices: what had to be decided when the data were read.
    """

    users: tuple[User, ...]
    unseen: tuple[int, ...]
    classes: tuple[str, ...]
    skew: str
    sources: dict[str, str] = field(default_factory=dict)
    remote: bool = False
    pooled: bool = False
    notices: tuple[str, ...] = ()

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """Indices of the users that train."""
        unseen = set(self.unseen)
        return tuple(i for i in range(len(self.users)) if i not in unseen)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.users[0].train.x.shape[1:])


def hold_out(users: int, unseen: int, seed: int, reserved: int = 0) -> tuple[int, ...]:
    """Indices of the unseen users: folds of one fixed shuffle, so that successive seeds hold out different users.

    The first ``reserved`` users of the shuffle, which the first seeds would hold out, are skipped.

    >>> sorted(hold_out(6, 2, 0) + hold_out(6, 2, 1) + hold_out(6, 2, 2))
    [0, 1, 2, 3, 4, 5]
    >>> hold_out(6, 2, 0, reserved=2) == hold_out(6, 2, 1)
    True
    """
    order = hold_out_order(users)[reserved:]
    if not 0 <= unseen < len(order):
        raise UserError(
            f"{unseen} unseen of {len(order)} users leaves no user for training; choose 0 to {max(0, len(order) - 1)}"
        )
    return tuple(sorted(order[(seed * unseen + i) % len(order)] for i in range(unseen)))


def hold_out_order(users: int) -> list[int]:
    """Fixed order in which users are held out, the same for all seeds."""
    order: list[int] = numpy_generator(0, "unseen users").permutation(users).tolist()
    return order
