"""Schedules of the clients' learning rate over the rounds. All clients of a round have the same rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.plugins import discover, parse


@dataclass(frozen=True)
class Schedule:
    """Base class of schedules.

    Attributes:
        name: name on the command line.
        about: one-line description.
        depends_on_rounds: whether the rate of a round depends on the total number of rounds.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    depends_on_rounds: ClassVar[bool] = False

    def factor(self, round: int, rounds: int) -> float:
        """Factor of the learning rate.

        Args:
            round: round of the schedule, from 1 to ``rounds``; warm-up is not counted.
            rounds: number of rounds of the schedule.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate in all rounds.

    >>> Constant().factor(3, 10)
    1.0
    """

    name = "constant"
    about = "the same rate in all rounds"

    def factor(self, round: int, rounds: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Half a cosine, from 1 to almost 0 (Loshchilov, Hutter, ICLR 2017, without restarts).

    https://arxiv.org/abs/1608.03983

    >>> [round(Cosine().factor(r, 4), 2) for r in (1, 3, 4)]
    [1.0, 0.5, 0.15]
    """

    name = "cosine"
    about = "half a cosine, down to almost 0"
    depends_on_rounds = True

    def factor(self, round: int, rounds: int) -> float:
        return (1 + math.cos(math.pi * (round - 1) / rounds)) / 2


@dataclass(frozen=True)
class Step(Schedule):
    """Multiplies the rate by a factor after every few rounds.

    Attributes:
        every: rounds between two changes.
        factor_: the factor.

    Raises:
        UserError: a value is out of bounds.

    >>> [round(Step(every=2, factor_=0.5).factor(r, 9), 2) for r in (1, 2, 3, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """

    name = "step"
    about = "multiplied by a factor after every few rounds; options every, factor"
    every: int = 10
    factor_: float = 0.1

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.factor_ <= 1:
            raise UserError("step: every must be at least 1, and factor above 0 and at most 1")

    def factor(self, round: int, rounds: int) -> float:
        return self.factor_ ** ((round - 1) // self.every)


def schedules() -> dict[str, type[Schedule]]:
    """All available schedules, by name."""
    return discover("fedbn.optim", Schedule)


@lru_cache(maxsize=64)
def schedule(text: str) -> Schedule:
    """Parse a schedule such as ``cosine`` or ``step:every=5:factor=0.5``.

    Raises:
        UserError: unknown schedule or option; the message suggests the nearest one.
    """
    return parse(text, "schedule", schedules())


def rate(plan: Plan, round: int) -> float:
    """Learning rate of the clients in a round, counted from 1.

    In the ``warmup`` rounds it rises linearly (Goyal et al., 2017, https://arxiv.org/abs/1706.02677); the schedule
    begins after them.

    >>> plan = Plan(rounds=5, lr=0.1, schedule="cosine", warmup=1)
    >>> [round(rate(plan, r), 3) for r in (1, 2, 4, 5)]
    [0.05, 0.1, 0.05, 0.015]
    """
    if round <= plan.warmup:
        return plan.lr * round / (plan.warmup + 1)
    return plan.lr * schedule(plan.schedule).factor(round - plan.warmup, plan.rounds - plan.warmup)
