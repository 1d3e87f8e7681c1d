"""Starts: what a user provides before the stream begins, from an earlier recording."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.online.prequential import balanced_rows
from fedbn.plugins import parse


@dataclass(frozen=True)
class Start(ABC):
    """Base class of starts: what a user provides before the stream begins.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        needs_classes: whether the windows are selected by class.
        n0: weight of the source statistics in the calibration, in windows. The sensor placement changes between
            recordings, so a large weight helps where there are many windows.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    needs_classes: ClassVar[bool] = False
    n0: float = 2.0

    def __post_init__(self) -> None:
        if self.n0 < 0:
            raise UserError(f"start {self.name!r}: n0 must be at least 0, not {self.n0:g}")

    @abstractmethod
    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        """Calibration windows ``[n, *shape]``, or None."""


@dataclass(frozen=True)
class Cold(Start):
    """No calibration: the source model's statistics."""

    name = "cold"
    about = "no calibration: the source model's statistics"

    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Recording(Start):
    """The whole earlier recording, without labels."""

    name = "recording"
    about = "the user's earlier recording, unlabeled"

    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        return earlier.x


@dataclass(frozen=True)
class Classes(Start):
    """Guided calibration: equally many windows of each class. Labels are used only to select the windows.

    Attributes:
        k: windows per class, or as many as the rarest class has.
    """

    name = "classes"
    about = "k windows of each class from the earlier recording"
    needs_classes = True
    k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"start 'classes': k must be at least 1, not {self.k}")

    def windows(self, earlier: Examples, draw: torch.Generator) -> Tensor | None:
        return earlier.x[balanced_rows(earlier.y, draw, self.k)]


def start(text: str) -> Start:
    """The start that a text such as ``cold`` or ``classes:k=1`` names.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    kinds: tuple[type[Start], ...] = (Cold, Recording, Classes)
    return parse(text, "start", {k.name: k for k in kinds})
