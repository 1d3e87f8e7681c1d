"""A scenario: real users with their recordings, some of them never seen in training.

``Scenario.load(seed)`` gives a `Population`. Splits are by whole recordings or with a gap, never by
overlapping windows; rows stay in the order in which they were recorded, so that a user's test set is
also a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fedbn.data.population import Population
from fedbn.plugins import discover, parse


@dataclass(frozen=True)
class Scenario(ABC):
    """Fields are the scenario's options; subclasses live one to a file in ``fedbn.scenarios``.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        model: name of the model used unless the run says otherwise.
        plan: settings (fields of `fedbn.config.Plan`) that differ from the general defaults here.
        rates: learning rates of strategies for which validation data chose another than the plan's.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    model: ClassVar[str]
    plan: ClassVar[dict[str, object]] = {}
    rates: ClassVar[dict[str, float]] = {}

    @abstractmethod
    def load(self, seed: int) -> Population:
        """Load, check and split the data. ``seed`` decides which users are unseen."""


def scenarios() -> dict[str, type[Scenario]]:
    """All scenarios found, by name."""
    return discover("fedbn.scenarios", Scenario)


def scenario(text: str) -> Scenario:
    """The scenario that a text such as ``hapt`` or ``hapt:unseen=10`` names."""
    return parse(text, "scenario", scenarios())
