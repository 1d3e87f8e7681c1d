"""Drift detectors: ADWIN and Page-Hinkley, from river."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fedbn.errors import UserError, install_extra
from fedbn.plugins import parse


class Alarm(Protocol):
    """Common interface of river's detectors."""

    @property
    def drift_detected(self) -> bool: ...

    def update(self, x: float) -> Any: ...


@dataclass(frozen=True)
class Detector(ABC):
    """Options of a detector; `new` creates one."""

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def new(self) -> Alarm:
        """Create a detector."""


@dataclass(frozen=True)
class Adwin(Detector):
    """Adaptive windowing.

    Attributes:
        delta: confidence; smaller values raise fewer alarms.
        clock: windows between two checks.

    >>> Adwin().delta
    0.002
    """

    name = "adwin"
    about = "adaptive windowing"
    source = "Bifet, Gavaldà 2007, https://doi.org/10.1137/1.9781611972771.42"
    delta: float = 0.002
    clock: int = 8

    def new(self) -> Alarm:
        return _river("ADWIN")(delta=self.delta, clock=self.clock)


@dataclass(frozen=True)
class PageHinkley(Detector):
    """Page-Hinkley test: cumulative sum of the excess over the mean.

    Attributes:
        threshold: an alarm is raised when the sum exceeds it.
        delta: tolerated excess.

    >>> PageHinkley().delta
    0.05
    """

    name = "page-hinkley"
    about = "cumulative sum of excess over the mean"
    source = "Page 1954, https://doi.org/10.2307/2333009"
    threshold: float = 3.0
    delta: float = 0.05

    def new(self) -> Alarm:
        return _river("PageHinkley")(threshold=self.threshold, delta=self.delta, mode="up")


def _river(name: str) -> Callable[..., Alarm]:
    # Imported here because river is optional.
    try:
        from river import drift
    except ImportError:
        raise UserError("drift detection needs river: " + install_extra("online")) from None
    factory: Callable[..., Alarm] = getattr(drift, name)
    return factory


def detector(text: str) -> Detector:
    """Detector from a text such as ``adwin:delta=0.01``.

    Raises:
        UserError: unknown name or option, or river is not installed.
    """
    kinds: tuple[type[Detector], ...] = (Adwin, PageHinkley)
    parsed = parse(text, "drift detector", {k.name: k for k in kinds})
    parsed.new()  # raises the error before any work starts
    return parsed
