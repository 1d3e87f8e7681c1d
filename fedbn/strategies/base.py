"""A treatment of normalization in federated learning, as a value.

`NormStrategy` is a frozen dataclass. Its class variables say, role by role, whose value counts (`Owner`);
its fields are hyper-parameters; a few hooks do the rest. The base class is global BN, naively averaged:
a strategy's file holds only what differs, and lies in ``fedbn.strategies``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from fedbn.data.population import Examples, Population, User
from fedbn.nn.conversion import require_statistics
from fedbn.nn.roles import Role, State
from fedbn.plugins import discover, parse
from fedbn.statistics.consensus import Aggregates, ConsensusStep
from fedbn.statistics.moments import Moments, naive_mean
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED, Owner, Ownership


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``round`` counts from 1 to ``rounds``.

    Attributes:
        known: whether the server remembers what this client told it (`NormStrategy.is_known_client`).
    """

    round: int
    rounds: int
    known: bool = False


@dataclass(frozen=True)
class Update:
    """What one client sends after training.

    Attributes:
        user: index of the client in the population.
        state: the entries that travel, after local training.
        examples: number of training examples.
        loss: mean training loss of the round.
        notes: what else the treatment tells the server (`NormStrategy.before_local_training`,
            `NormStrategy.after_local_training`).
    """

    user: int
    state: State
    examples: int
    loss: float
    notes: State = field(default_factory=dict)


@dataclass(frozen=True)
class NormStrategy:
    """Global BN: everything shared, running statistics averaged like weights.

    Attributes:
        name: what the command line calls it.
        about: one line for lists.
        source: authors, year, link.
        body, head, affine, gate, statistics: the owner of each role. Counters are always local.
        is_centralized: all seen users' data are brought to one place (the centralized bound).
        syncs_statistics: `sync_statistics` is held before each evaluation.
        syncs_first_batch: `sync_first_batch` is held before each round of training.
        newcomer: in words, what an unseen user starts from.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""
    body: ClassVar[Owner] = SHARED
    head: ClassVar[Owner] = SHARED
    affine: ClassVar[Owner] = SHARED
    gate: ClassVar[Owner] = SHARED
    statistics: ClassVar[Owner] = SHARED
    is_centralized: ClassVar[bool] = False
    syncs_statistics: ClassVar[bool] = False
    syncs_first_batch: ClassVar[bool] = False

    def owners(self) -> dict[Role, Owner]:
        """Owner of every role."""
        return {
            Role.BODY: self.body,
            Role.HEAD: self.head,
            Role.AFFINE: self.affine,
            Role.GATE: self.gate,
            Role.STATISTICS: self.statistics,
            Role.COUNTER: LOCAL,
        }

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Adapt a freshly built model, in place or as a new one.

        Raises:
            UserError: the strategy makes no sense for this model.
        """
        require_statistics(model, f"strategy {self.name!r}")
        return model

    def validate_population(self, population: Population) -> None:
        """Raise `UserError` for users that the strategy cannot serve (groups not known, for example)."""

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        """What a client tells about the received model on its data, before it trains; may set the model up by them."""
        return {}

    def sync_first_batch(self, model: nn.Module, batch: Examples, aggregates: Aggregates) -> dict[str, Moments] | None:
        """What a client says next about its first batch before a round of training (only if ``syncs_first_batch``).

        Args:
            model: as received.
            batch: the rows of the client's first step.
            aggregates: the answers so far.

        Returns:
            Moments by name, or None when there is nothing more to say.
        """
        raise NotImplementedError(f"{self.name} does not consult")

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        """Set the model's mode for one round of local training, given what was heard in consulting."""
        model.train()

    def on_before_optimizer_step(self, model: nn.Module) -> None:
        """Look at, or change, the gradients between backward pass and optimizer step."""

    def after_local_training(self, model: nn.Module) -> State:
        """What a client tells besides its entries after it has trained; may still write statistics into the model."""
        return {}

    def aggregate_statistics(
        self, updates: Sequence[Update], weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        """The server's new statistics entries ``keys`` from what clients sent and what it had (``old``)."""
        return {k: naive_mean([u.state[k] for u in updates], weights) for k in keys}

    def is_known_client(self, user: int, known: State) -> bool:
        """Whether the server has no need to hear from a client again, from what `group_states` remembers."""
        return False

    def group_of(self, index: int, user: User) -> str:
        """Name of the view of the server's state that a user gets; users of one view get the same."""
        return ""

    def group_states(
        self,
        updates: Sequence[Update],
        weights: Sequence[float],
        table: Ownership,
        population: Population,
        known: State,
    ) -> dict[str, State]:
        """Entries in which views differ from the server's state, by view, after aggregation.

        Args:
            updates: what clients sent.
            weights: their weights in the mean.
            table: who owns what.
            population: all users.
            known: what the server remembers for this purpose between rounds; written in place.
        """
        return {}

    def sync_statistics(self, model: nn.Module, x: Tensor) -> ConsensusStep:
        """A client's part in agreeing on statistics after aggregation (only if ``syncs_statistics``)."""
        raise NotImplementedError(f"{self.name} does not settle")

    def load_statistics(self, model: nn.Module, aggregates: Aggregates) -> None:
        """Write the statistics agreed on in settling into a model, in place (only if ``syncs_statistics``)."""
        raise NotImplementedError(f"{self.name} does not settle")

    def predict_stream(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Logits of a user's unlabeled stream ``x``, where the strategy adapts in a way of its own; else None.

        The model is left as it is after the stream.
        """
        return None

    @property
    def newcomer(self) -> str:
        """In words, what a user starts from who has never trained."""
        owners = self.owners()
        if owners[Role.BODY] is LOCAL:
            return "none: no model is shared"
        words = {SHARED: "the server's", SEEDED: "the clients' mean", LOCAL: "initial"}
        return f"statistics {words[owners[Role.STATISTICS]]}, scale and shift {words[owners[Role.AFFINE]]}"


class StatelessNorm(NormStrategy):
    """Base of strategies whose normalization keeps no running statistics."""

    @property
    def newcomer(self) -> str:
        return "the server's model; there are no statistics"


def strategies() -> dict[str, type[NormStrategy]]:
    """All strategies found, by name."""
    return discover("fedbn.strategies", NormStrategy)


def strategy(text: str) -> NormStrategy:
    """The strategy that a text such as ``fedbn`` or ``groupnorm:groups=4`` names.

    Raises:
        UserError: unknown strategy or option, with the nearest one suggested.
    """
    return parse(text, "strategy", strategies())
