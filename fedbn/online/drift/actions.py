"""Actions after a drift alarm: decay, reset or branch a user's statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, Protocol

from fedbn.errors import UserError
from fedbn.online.drift.detectors import Alarm
from fedbn.online.drift.signal import Floats, GroupStatistics
from fedbn.online.prequential import OnlineModel
from fedbn.plugins import parse

BRANCH_WINDOWS = 6
"""Windows by which `Branch` selects saved statistics: no detector here raises an alarm sooner after a change."""


class PersonalizedModel(OnlineModel, Protocol):
    """A model with one state per user that can be read and replaced."""

    def state(self, user: str) -> Any: ...

    def load(self, user: str, state: Any) -> Any: ...

    def reset(self, user: str) -> Any: ...


@dataclass
class UserMonitor:
    """Drift detection of one user.

    Attributes:
        alarm: the detector.
        statistics: channel means by class since the last action, without the recent windows: an alarm comes late, and
            windows after a change must not be mixed with those before it.
        saved: statistics saved by `Branch`, each with the user's state at that time.
        recent: channel means ``[C]`` and class of the last windows.
        alarms: number of windows seen at each alarm.
        num_windows: number of windows seen.
    """

    alarm: Alarm
    statistics: GroupStatistics
    saved: list[tuple[GroupStatistics, Any]] = field(default_factory=list)
    recent: list[tuple[Floats, int]] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    num_windows: int = 0

    def restart(self) -> None:
        """Start with empty statistics."""
        self.statistics = GroupStatistics(len(self.statistics.n), self.statistics.scale)


@dataclass(frozen=True)
class Action(ABC):
    """What to do after an alarm."""

    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def apply(self, net: PersonalizedModel, user: str, monitor: UserMonitor) -> None:
        """Change the user's state in ``net`` and the statistics of ``monitor``."""


@dataclass(frozen=True)
class Decay(Action):
    """Reduce the weight of the user's statistics to that of a few windows.

    Attributes:
        n: maximum weight, in windows.

    >>> Decay().n
    16
    """

    name = "decay"
    about = "reduce the weight of the user's statistics to n windows"
    n: int = 16

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UserError(f"action 'decay': n must not be negative, it is {self.n}")

    def apply(self, net: PersonalizedModel, user: str, monitor: UserMonitor) -> None:
        state = net.state(user)
        if state.n > self.n:
            net.load(user, state.decay(self.n / state.n))
        monitor.restart()


@dataclass(frozen=True)
class Reset(Action):
    """Return to the source's statistics.

    >>> Reset().name
    'reset'
    """

    name = "reset"
    about = "return to the source's statistics"

    def apply(self, net: PersonalizedModel, user: str, monitor: UserMonitor) -> None:
        net.reset(user)
        monitor.restart()


@dataclass(frozen=True)
class Branch(Action):
    """Save the statistics. Restore the saved ones that fit the last windows best, or start again from the source.

    Attributes:
        near: saved statistics fit if their distance z from the last windows is at most this.
        most: maximum number of saved statistics; the oldest are dropped.

    >>> Branch().most
    4
    """

    name = "branch"
    about = "save the statistics and restore saved ones that fit"
    near: float = 2.0
    most: int = 4

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UserError(f"action 'branch': most must be at least 1, not {self.most}")

    def apply(self, net: PersonalizedModel, user: str, monitor: UserMonitor) -> None:
        recent = monitor.recent[-BRANCH_WINDOWS:]
        distances = [(_distance(statistics, recent), i) for i, (statistics, _) in enumerate(monitor.saved)]
        best = min(((z, i) for z, i in distances if z is not None), default=None)
        match = monitor.saved.pop(best[1]) if best is not None and best[0] <= self.near else None
        monitor.saved = [*monitor.saved, (monitor.statistics, net.state(user))][-self.most :]
        if match is None:
            net.reset(user)
            monitor.restart()
        else:
            monitor.statistics, state = match
            net.load(user, state)


def _distance(statistics: GroupStatistics, recent: Sequence[tuple[Floats, int]]) -> float | None:
    """Median distance of the last windows; None if no class has enough windows.

    Each window is compared with the nearest class, because its predicted class may be wrong after a change.
    """
    distances = [[statistics.distance(x, label) for label in range(len(statistics.n))] for x, _ in recent]
    nearest = [min(known) for row in distances if (known := [z for z in row if z is not None])]
    return median(nearest) if nearest else None


def action(text: str) -> Action:
    """Action from a text such as ``decay:n=8``.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    kinds: tuple[type[Action], ...] = (Decay, Reset, Branch)
    return parse(text, "action on drift", {k.name: k for k in kinds})
