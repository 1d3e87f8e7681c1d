"""Scenarios: data sets of real users, some of whom are never seen in training.

``Scenario.load(seed)`` returns a `Population`. Data are split by whole recordings or with a gap, so that
windows never overlap across a split. Rows stay in the order of recording, so that a user's test set is also a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fedbn.data.population import Population
from fedbn.plugins import discover, parse
from fedbn.tasks import Task


@dataclass(frozen=True)
class Scenario(ABC):
    """Base class of scenarios; fields are options. Subclasses are in ``fedbn.scenarios``, one per module.

    Attributes:
        name: name on the command line.
        about: one-line description.
        model: default model.
        task: default task.
        plan: settings (fields of `fedbn.config.Plan`) that differ from the general defaults.
        rates: learning rates of the strategies for which validation data favored another rate than the plan's.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    model: ClassVar[str]
    task: ClassVar[str] = "classification"
    plan: ClassVar[dict[str, object]] = {}
    rates: ClassVar[dict[str, float]] = {}

    @abstractmethod
    def load(self, seed: int) -> Population:
        """Load, check and split the data. ``seed`` determines which users are unseen."""

    def load_for(self, task: Task, seed: int) -> Population:
        """Like `load`, with targets read as a task needs them. By default, the targets are fixed."""
        return self.load(seed)


def scenarios() -> dict[str, type[Scenario]]:
    """All discovered scenarios, by name."""
    return discover("fedbn.scenarios", Scenario)


def scenario(text: str) -> Scenario:
    """Parse a scenario such as ``hapt`` or ``hapt:unseen=10``."""
    return parse(text, "scenario", scenarios())
