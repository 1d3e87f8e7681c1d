"""Base class of personalization methods: which parameters are local to a client and how it trains them.

A *treatment* is a normalization strategy with an optional personalization method after a plus sign: ``fedbn``,
``groupnorm+ditto``, ``silobn+fedrep:head_epochs=2``. All combinations are supported. A method alone is combined with
FedAvg, as in its paper: ``fedprox:mu=0.1`` is ``global-naive+fedprox:mu=0.1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import nn

from fedbn.config import Plan
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.nn.roles import Role, State, clone
from fedbn.nn.schema import Schema
from fedbn.plugins import discover
from fedbn.strategies.base import Progress, Update, refuse_misspelled_hooks
from fedbn.strategies.ownership import Owner


class Fit(Protocol):
    """`fedbn.federation.training.fit` with the data, random draws and settings of a client."""

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
        """Train in place and return the mean loss."""
        ...


@dataclass
class ClientTrainer:
    """Local training of one client in a round, for use by a personalization method.

    Attributes:
        model: the model with the client's assembled state, in the strategy's training mode.
        data: the client's training examples.
        plan: settings.
        progress: progress of the run.
        roles: role of each entry of the model.
        fit: trains a model with the run's settings.
        set_training_mode: restores the strategy's training mode, for example after another state was loaded.
        broadcast: tensors that the server sends to all clients besides the model.
        method_state: tensors of the method that the client keeps between rounds; set by the method.
        notes: tensors that the client sends to the server besides its entries; set by the method.
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

    def names(self, *roles: Role) -> set[str]:
        """Names of the entries with any of these roles."""
        return {k for k, r in self.roles.items() if r in roles}

    def load(self, state: State) -> None:
        """Load a complete state and restore the training mode."""
        self.model.load_state_dict(state)
        self.set_training_mode()

    def state(self) -> State:
        """Copy of the model's complete state."""
        return clone(self.model.state_dict())


@dataclass(frozen=True)
class Personalization:
    """Base class of personalization methods; by itself, no personalization.

    A subclass that defines a method with a misspelled or former hook name is refused with a `UserError`.

    Attributes:
        name: name on the command line.
        title: readable name in tables; the name by default.
        aliases: other names.
        about: one-line description.
        source: authors and year.
        body, head: owner that overrides the strategy's, or None.
        depends_on_rounds: whether training depends on the total number of rounds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[str]
    source: ClassVar[str] = ""
    body: ClassVar[Owner | None] = None
    head: ClassVar[Owner | None] = None
    depends_on_rounds: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_misspelled_hooks(cls, Personalization, {"serve": "personalized_state", "tell": "server_broadcast"})

    def owners(self, table: dict[Role, Owner]) -> dict[Role, Owner]:
        """The strategy's owners, overridden by this method's."""
        overrides = {Role.BODY: self.body, Role.HEAD: self.head}
        return table | {role: owner for role, owner in overrides.items() if owner is not None}

    def validate_model(self, trainable: dict[str, Role]) -> None:
        """Check that the method applies to a model.

        Args:
            trainable: roles of the trainable parameters, by name.

        Raises:
            UserError: it does not.
        """

    def notes_schema(self, model: nn.Module, roles: dict[str, Role]) -> Schema:
        """Declaration of the tensors that clients send in `ClientTrainer.notes`.

        The server rejects replies with notes that are not declared.

        Args:
            model: the prepared model.
            roles: role of each entry.
        """
        return {}

    def train(self, trainer: ClientTrainer) -> float:
        """Train a client's model for one round, in place; the shared entries are sent. Returns the mean loss."""
        return trainer.fit(trainer.model)

    def personalized_state(self, trainer: ClientTrainer) -> State:
        """Model state that a seen user is evaluated with, given its assembled model after aggregation."""
        return trainer.state()

    def server_broadcast(self, updates: Sequence[Update], broadcast: State, clients: int) -> State:
        """Tensors that the server sends to all clients next, besides the model.

        Args:
            updates: updates of the clients of this round.
            broadcast: tensors sent so far.
            clients: number of all clients, including those that were not sampled.
        """
        return broadcast


def require_trained(method: str, trainable: dict[str, Role], *, head: bool) -> None:
    """Raise a `UserError` unless the head (or the rest of the model) has trainable parameters."""
    if not any((role is Role.HEAD) == head for role in trainable.values()):
        part = "in its head" if head else "outside its head"
        raise UserError(
            f"{method} trains the head and the other layers separately, but the model has no trainable parameters "
            f"{part}: choose another method, or set the head with --head"
        )


def personalizations() -> dict[str, type[Personalization]]:
    """All available personalization methods, by name."""
    return discover("fedbn.personalization", Personalization)
