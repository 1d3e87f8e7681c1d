"""Scenarios: data sets of real users, some of whom are never seen in training.

``Scenario.load(seed)`` returns a `Population`. Data are split by whole recordings or with a gap, so that
windows never overlap across a split. Rows stay in the order of recording, so that a user's test set is also a stream.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedbn.data.population import Population
from fedbn.errors import UserError
from fedbn.objects import MEMORY, is_reference, reference, remember, split_options
from fedbn.plugins import discover, is_known, parse, render, resolve_reference, text_of
from fedbn.tasks import Task, parse_task


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

    @property
    def text(self) -> str:
        """The text that `scenario` converts to this scenario."""
        return render(self)

    @abstractmethod
    def load(self, seed: int) -> Population:
        """Load, check and split the data. ``seed`` determines which users are unseen."""

    def load_for(self, task: Task, seed: int) -> Population:
        """Like `load`, with targets read as a task needs them. By default, the targets are fixed."""
        return self.load(seed)


def scenarios() -> dict[str, type[Scenario]]:
    """All discovered scenarios, by name."""
    return discover("fedbn.scenarios", Scenario)


@dataclass(frozen=True)
class Given(Scenario):
    """A population that is given as an object, or by a function ``module:function``.

    Attributes:
        source: the population, or a function that returns it, or that returns the Datasets of each user
            (`Population.from_datasets`); the function may accept the argument ``seed``.
        reference: its text (`fedbn.objects`).
    """

    model: ClassVar[str] = "mlp"

    source: Population | Callable[..., Any]
    reference: str

    @property
    def text(self) -> str:
        return self.reference

    def load(self, seed: int) -> Population:
        return self.load_for(parse_task(self.task), seed)

    def load_for(self, task: Task, seed: int) -> Population:
        population = self.source if isinstance(self.source, Population) else self._call(self.source, seed)
        if isinstance(population, Mapping):
            population = Population.from_datasets(population, task=task)
        if not isinstance(population, Population):
            raise UserError(f"data {self.reference} is a {type(population).__name__}, not a fedbn.Population")
        sources = population.sources or {self.reference: population.digest}
        return replace(population.for_seed(seed), sources=sources)

    def _call(self, function: Callable[..., Any], seed: int) -> Any:
        try:
            return function(**({"seed": seed} if "seed" in inspect.signature(function).parameters else {}))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"data {self.reference} raises {type(error).__name__}: {error}") from error


def scenario(text: str) -> Scenario:
    """Parse a scenario such as ``hapt`` or ``hapt:unseen=10``, or the reference of a population (`scenario_text`)."""
    name, options = split_options(text)
    if is_reference(text) and not is_known(name.partition(":")[0], scenarios()):
        found = resolve_reference(name, "scenario", scenarios())
        if isinstance(found, Population) or (callable(found) and not _is_scenario(found)):
            if options:
                raise UserError(f"scenario {text!r} takes no options, because {name} is no class of scenarios")
            return Given(found, name)
    return parse(text, "scenario", scenarios(), Scenario)


def scenario_text(data: Any, task: Task | None = None) -> str:
    """The text that `scenario` converts to data that are given as an object.

    Args:
        data: a text, a `Population`, a `Scenario`, training and test Dataset of each user
            (`Population.from_datasets`), or a function that returns a population or Datasets.
        task: the task whose targets Datasets hold; None for classes.

    Raises:
        UserError: another object.
    """
    if isinstance(data, Mapping):
        data = Population.from_datasets(data, task=task)
    if isinstance(data, Population):
        return remember(data, f"{MEMORY}:population-{data.digest[:12]}")
    if isinstance(data, str) or _is_scenario(data):
        return text_of(data, "scenario", scenarios(), Scenario)
    if callable(data):
        return reference(data)
    raise UserError(
        "data must be a scenario, a fedbn.Population, a dictionary with a pair of Datasets for each user, or a "
        f"function that returns one, not a {type(data).__name__}"
    )


def _is_scenario(value: Any) -> bool:
    return isinstance(value, Scenario) or (inspect.isclass(value) and issubclass(value, Scenario))
