"""Examples and users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbn.data.lazy import LazyRows

UNLABELED = -1
"""Label of a sample or window without a class."""


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

    def subset(self, index: Tensor) -> Examples:
        """Like `take`, but values of memory-mapped data are not read yet."""
        if not isinstance(self.x, LazyRows):
            return self.take(index)
        return Examples(self.x.subset(index), self.y[index], self.recording[index])

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
        stream: all windows of the test recordings, in the order of recording; those without a class have the label -1.
            None if the test examples are all windows.
    """

    name: str
    domain: str
    train: Examples
    test: Examples
    validation: Examples | None = None
    stream: Examples | None = None
