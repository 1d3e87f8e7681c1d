"""Personalization, apart from normalization: which parameters are a client's own, and how it trains them.

A *treatment* is a strategy for the normalization layers and, after a plus sign, a method of personalization:
``fedbn``, ``groupnorm+ditto``, ``silobn+fedrep:head_epochs=2``. Every pair can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import nn

from fedbn.config import Plan
from fedbn.data.population import Examples
from fedbn.nn.roles import Role, State, clone
from fedbn.plugins import discover
from fedbn.strategies.base import Progress, Update
from fedbn.strategies.ownership import Owner


class Fit(Protocol):
    """`fedbn.federation.training.fit` with a client's data, draws and settings filled in."""

    def __call__(
        self,
        model: nn.Module,
        *,
        pull: tuple[float, State] | None = None,
        only: set[str] | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        on_before_optimizer_step: Callable[[nn.Module], None] | None = None,
        purpose: str = "",
    ) -> float:
        """Train in place; mean loss."""
        ...


@dataclass
class ClientTrainer:
    """One client's work in a round, as a personalization method sees it.

    Attributes:
        model: holds the client's assembled state, in training mode as the strategy wishes.
        data: the client's training examples.
        plan: settings.
        progress: where the run stands.
        roles: role of every entry of the model.
        fit: trains a model with the run's settings.
        set_training_mode: puts the model into the strategy's training mode again (after another state was loaded).
        broadcast: what the server tells all clients besides the model.
        method_state: what the client keeps for the method besides model entries; to be written.
        notes: what the client tells the server besides model entries; to be written.
    """

    model: nn.Module
    data: Examples
    plan: Plan
    progress: Progress
    roles: dict[str, Role]
    fit: Fit
    set_training_mode: Callable[[], None]
    broadcast: State = field(default_factory=dict)
    method_state: State = field(default_factory=dict)
    notes: State = field(default_factory=dict)

    def names(self, *wanted: Role) -> set[str]:
        """Names of the entries with any of these roles."""
        return {k for k, r in self.roles.items() if r in wanted}

    def load(self, state: State) -> None:
        """Load a whole state and go back to training mode."""
        self.model.load_state_dict(state)
        self.set_training_mode()

    def state(self) -> State:
        """A copy of the model's whole state."""
        return clone(self.model.state_dict())


@dataclass(frozen=True)
class Personalization:
    """No personalization: what is local is the normalization strategy's choice alone.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        source: authors, year, link.
        body, head: another owner than the strategy's, or None.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""
    body: ClassVar[Owner | None] = None
    head: ClassVar[Owner | None] = None

    def owners(self, table: dict[Role, Owner]) -> dict[Role, Owner]:
        """The strategy's table of owners with this method's own choices."""
        mine = {Role.BODY: self.body, Role.HEAD: self.head}
        return table | {role: owner for role, owner in mine.items() if owner is not None}

    def train(self, trainer: ClientTrainer) -> float:
        """A client's training of one round: the model is left as it is to be sent. Mean loss."""
        return trainer.fit(trainer.model)

    def personalized_state(self, trainer: ClientTrainer) -> State:
        """The state a seen user is served with, given its model as assembled after aggregation."""
        return trainer.state()

    def server_broadcast(self, updates: Sequence[Update], broadcast: State, clients: int) -> State:
        """What the server tells all clients next, besides the model; ``clients`` could have trained."""
        return broadcast


def personalizations() -> dict[str, type[Personalization]]:
    """All methods found, by name."""
    return discover("fedbn.personalization", Personalization)
