r"""Notice without labels that the person or the sensor has changed, and do something about the statistics.

*Signal.* The channel means :math:`m` of a window at the inputs of the first BN layers are compared with those of the
windows met before *that were given the same class*, so that a new activity is no drift. With their mean :math:`M` and
variance :math:`V`, :math:`z=\overline{(m-M)^2/V}` over channels is about 1 while nothing changes. The layers are the
source model's: what a rule does to its statistics does not move the signal.

*Detector.* ADWIN or Page-Hinkley from river, one for each user, on :math:`z/(1+z)\in[0,1)`.

*Action.* ``decay`` lets what was learnt count little, ``reset`` forgets it, ``branch`` puts it aside and takes out what
was put aside before if that fits the last windows better. On streams in bouts a reset loses classes that do not come
again for a while; decay is the safer choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.layers import inputs_of, require_statistics
from fedbn.roles import statistics_layers
from fedbn.spec import parse

FEWEST = 8
"""Windows of a class before the next ones are compared with them."""

RECENT = 12
"""Windows that may have come after a change which was not noticed yet."""

JUDGED = 6
"""Windows by which `Branch` judges which context fits: no detector here speaks sooner after a change."""

FLOOR = 1e-3
"""Least variance of a channel's mean between windows, relative to the source's variance of the channel."""


class Personal(Protocol):
    """What follows many users and lets their states be exchanged."""

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor: ...

    def commit(self, posterior: Tensor | None = None) -> Any: ...

    def state(self, user: str) -> Any: ...

    def load(self, user: str, state: Any) -> Any: ...

    def reset(self, user: str) -> Any: ...


# ---------------------------------------------------------------- signal


class Look:
    """Channel means of windows at the inputs of a model's first BN layers.

    Args:
        model: the source; it is not changed.
        layers: how many.
    """

    def __init__(self, model: nn.Module, layers: int = 2) -> None:
        require_statistics(model, "drift detection")
        self.model = model
        self.layers = dict(list(statistics_layers(model).items())[:layers])
        scales = [m.running_var for m in self.layers.values()]
        self.scale = torch.cat([torch.as_tensor(v).double() for v in scales])

    def __call__(self, x: Tensor) -> Tensor:
        """``[b, sum of channels]`` in float64 for windows ``[b, *shape]``."""
        seen: list[Tensor] = []
        self.model.eval()
        with torch.no_grad(), inputs_of(self.layers, lambda _path, value: seen.append(value)):
            self.model(x)
        return torch.cat([v.double().flatten(2).mean(2) if v.dim() > 2 else v.double() for v in seen], 1)


@dataclass
class Context:
    """What one user's windows look like, class by class: a running mean and variance of `Look`.

    Attributes:
        scale: ``[C]`` variance of each channel under the source.
        n: class -> windows met.
        mean, m2: class -> ``[C]`` mean and sum of squared deviations.
    """

    scale: Tensor
    n: dict[int, int] = field(default_factory=dict)
    mean: dict[int, Tensor] = field(default_factory=dict)
    m2: dict[int, Tensor] = field(default_factory=dict)

    def distance(self, m: Tensor, label: int) -> float | None:
        """The z of one window ``[C]``; None while too few of its class were met."""
        n = self.n.get(label, 0)
        if n < FEWEST:
            return None
        variance = torch.maximum(self.m2[label] / (n - 1), FLOOR * self.scale)
        return float(((m - self.mean[label]) ** 2 / variance).mean())

    def learn(self, m: Tensor, label: int) -> None:
        """Add one window ``[C]`` (Welford 1962)."""
        n = self.n[label] = self.n.get(label, 0) + 1
        old = self.mean.get(label, torch.zeros_like(m))
        new = self.mean[label] = old + (m - old) / n
        self.m2[label] = self.m2.get(label, torch.zeros_like(m)) + (m - old) * (m - new)


# ---------------------------------------------------------------- detectors


class Alarm(Protocol):
    """What river's detectors have in common."""

    @property
    def drift_detected(self) -> bool: ...

    def update(self, x: float) -> Any: ...


@dataclass(frozen=True)
class Detector(ABC):
    """A detector as a value; `new` makes one for a user."""

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def new(self) -> Alarm:
        """A detector that has seen nothing."""


@dataclass(frozen=True)
class Adwin(Detector):
    """Adaptive windowing.

    Attributes:
        delta: confidence; smaller alarms less.
        clock: windows between two looks.

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
    """Cumulative sum of what exceeds the mean.

    Attributes:
        threshold: of the sum.
        delta: excess that is tolerated.

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
        raise UserError("drift detection needs river: pip install 'fedbn[online]'") from None
    found: Callable[..., Alarm] = getattr(drift, name)
    return found


# ---------------------------------------------------------------- actions


@dataclass
class Watch:
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
    def act(self, net: Personal, user: str, watch: Watch) -> None:
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

    def act(self, net: Personal, user: str, watch: Watch) -> None:
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

    def act(self, net: Personal, user: str, watch: Watch) -> None:
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

    def act(self, net: Personal, user: str, watch: Watch) -> None:
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


def detector(text: str) -> Detector:
    """The detector that a text such as ``adwin:delta=0.01`` names.

    Raises:
        UserError: unknown name or option.
    """
    kinds: tuple[type[Detector], ...] = (Adwin, PageHinkley)
    return parse(text, "drift detector", {k.name: k for k in kinds})


def action(text: str) -> Action:
    """The action that a text such as ``decay:n=8`` names.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    kinds: tuple[type[Action], ...] = (Decay, Reset, Branch)
    return parse(text, "action on drift", {k.name: k for k in kinds})


class Watched:
    """A follower under watch: predicts and learns as ``net`` does, and acts when a user's detector speaks.

    Args:
        net: follows the users.
        model: the source, for the signal.
        notice: what detects.
        act: what is done then.
    """

    def __init__(self, net: Personal, model: nn.Module, notice: Detector, act: Action) -> None:
        self.net, self.look, self.notice, self.action = net, Look(model), notice, act
        self.watches: dict[str, Watch] = {}
        self._last: tuple[Tensor, list[str]] | None = None

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor:
        """Logits of the follower."""
        self._last = (x, list(user))
        return self.net.predict(x, user=user)

    def commit(self, posterior: Tensor | None = None) -> None:
        """Let the follower learn, then look at the windows.

        Raises:
            ValueError: nothing was predicted before.
        """
        if self._last is None or posterior is None:
            raise ValueError("commit follows a predict and takes its posterior")
        self.net.commit(posterior=posterior)
        x, users = self._last
        for m, label, user in zip(self.look(x), posterior.argmax(1).tolist(), users, strict=True):
            self._see(user, m, label)

    def _see(self, user: str, m: Tensor, label: int) -> None:
        watch = self.watches.setdefault(user, Watch(self.notice.new(), Context(self.look.scale)))
        watch.met += 1
        watch.recent.append((m, label))
        if len(watch.recent) > RECENT:
            watch.context.learn(*watch.recent.pop(0))
        z = watch.context.distance(m, label)
        if z is not None:
            watch.alarm.update(z / (1 + z))
            if watch.alarm.drift_detected:
                watch.alarms.append(watch.met)
                self.action.act(self.net, user, watch)
                watch.alarm, watch.recent = self.notice.new(), []
