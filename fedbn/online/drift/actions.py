"""What to do after a drift alarm: decay, reset or branch a user's statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fedbn.errors import UserError
from fedbn.online.drift.detectors import Alarm
from fedbn.online.drift.signal import Context
from fedbn.plugins import parse

JUDGED = 6
"""Windows by which `Branch` judges which context fits: no detector here speaks sooner after a change."""


class Personal(Protocol):
    """What follows many users and lets their states be exchanged."""

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor: ...

    def commit(self, posterior: Tensor | None = None) -> Any: ...

    def state(self, user: str) -> Any: ...

    def load(self, user: str, state: Any) -> Any: ...

    def reset(self, user: str) -> Any: ...


@dataclass
class UserMonitor:
    """One user under watch.

    Attributes:
        alarm: the user's detector.
        context: what windows have looked like since the last action, but for the recent ones: an alarm comes late, and
            what follows a change belongs to another context.
        aside: contexts put aside, each with the user's state then.
        recent: the last windows' looks and classes.
        alarms: after which windows the detector spoke.
        met: windows met.
    """

    alarm: Alarm
    context: Context
    aside: list[tuple[Context, Any]] = field(default_factory=list)
    recent: list[tuple[Tensor, int]] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    met: int = 0

    def anew(self) -> None:
        """A new context, of what came last."""
        self.context = Context(self.context.scale)


@dataclass(frozen=True)
class Action(ABC):
    """What to do at an alarm, as a value."""

    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def act(self, net: Personal, user: str, watch: UserMonitor) -> None:
        """Change the user's statistics and context."""


@dataclass(frozen=True)
class Decay(Action):
    """What was learnt counts as few windows.

    Attributes:
        n: how many at most.

    >>> Decay().n
    16
    """

    name = "decay"
    about = "what was learnt counts as n windows"
    n: int = 16

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UserError(f"action 'decay': n must not be negative, it is {self.n}")

    def act(self, net: Personal, user: str, watch: UserMonitor) -> None:
        state = net.state(user)
        if state.n > self.n:
            net.load(user, state.decay(self.n / state.n))
        watch.anew()


@dataclass(frozen=True)
class Reset(Action):
    """Back to the source.

    >>> Reset().name
    'reset'
    """

    name = "reset"
    about = "back to the source's statistics"

    def act(self, net: Personal, user: str, watch: UserMonitor) -> None:
        net.reset(user)
        watch.anew()


@dataclass(frozen=True)
class Branch(Action):
    """Put the context aside; take out the one that fits the last windows best, or begin a new one at the source.

    Attributes:
        near: a context fits if its distance z to the last windows is at most this.
        most: contexts kept; the oldest gives way.

    >>> Branch().most
    4
    """

    name = "branch"
    about = "put the statistics aside and take out those that fit"
    near: float = 2.0
    most: int = 4

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UserError(f"action 'branch': most must be at least 1, not {self.most}")

    def act(self, net: Personal, user: str, watch: UserMonitor) -> None:
        fits = [(_distance(context, watch.recent[-JUDGED:]), i) for i, (context, _) in enumerate(watch.aside)]
        best = min(((z, i) for z, i in fits if z is not None), default=None)
        found = watch.aside.pop(best[1]) if best is not None and best[0] <= self.near else None
        watch.aside = [*watch.aside, (watch.context, net.state(user))][-self.most :]
        if found is None:
            net.reset(user)
            watch.anew()
        else:
            watch.context, state = found
            net.load(user, state)


def _distance(context: Context, recent: Sequence[tuple[Tensor, int]]) -> float | None:
    """How far the last windows are from a context; None while it knows too little.

    Each from the nearest class: under the statistics of somebody else they were given wrong ones.
    """
    near = [[z for label in context.n if (z := context.distance(m, label)) is not None] for m, _ in recent]
    known = [min(zs) for zs in near if zs]
    return median(known) if known else None


def action(text: str) -> Action:
    """The action that a text such as ``decay:n=8`` names.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    kinds: tuple[type[Action], ...] = (Decay, Reset, Branch)
    return parse(text, "action on drift", {k.name: k for k in kinds})
