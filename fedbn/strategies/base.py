"""Base class of normalization strategies.

`NormStrategy` is a frozen dataclass. Its class variables set the owner of each role (`Owner`), its fields are
hyperparameters, and its hooks change single steps of a round. The base class implements naively averaged global BN; a
subclass overrides only what differs. All modules of ``fedbn.strategies`` are discovered automatically.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, overload

from torch import Tensor, nn

from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.nn.conversion import FEDAVG, convert, require_batch_norm, require_statistics
from fedbn.nn.roles import Role, State
from fedbn.nn.schema import Schema
from fedbn.plugins import discover, parse
from fedbn.statistics.consensus import Aggregates, ConsensusStep
from fedbn.statistics.moments import Moments, naive_mean
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED, Owner, Ownership

FORMER_HOOKS = {
    "prepare": "prepare_model",
    "suit": "validate_population",
    "measure": "before_local_training",
    "consult": "sync_first_batch",
    "begin": "set_training_mode",
    "before_step": "on_before_optimizer_step",
    "report": "after_local_training",
    "pool": "aggregate_statistics",
    "met": "is_known_client",
    "view": "group_of",
    "views": "group_states",
    "settle": "sync_statistics",
    "adopt": "load_statistics",
    "follow": "predict_stream",
    "gathers": "is_centralized",
    "consults": "syncs_first_batch",
    "settles": "syncs_statistics",
}
"""Former names of the hooks and flags of `NormStrategy`, and their current names."""


def refuse_misspelled_hooks(cls: type, base: type, former: Mapping[str, str]) -> None:
    """Refuse a class whose hook would be ignored silently because its name is misspelled or outdated.

    Args:
        cls: a new subclass of ``base``; its own public methods, properties, flags and owners are checked.
        base: the class that defines the hooks.
        former: current names of hooks, by former name.

    Raises:
        UserError: a name that no base class defines is a former hook name or closely resembles a hook name.
    """
    for name, value in vars(cls).items():
        is_inherited = any(hasattr(parent, name) for parent in cls.__bases__)
        if name.startswith("_") or is_inherited or not (_is_method(value) or isinstance(value, (bool, Owner))):
            continue
        hooks = [h for h, v in vars(base).items() if not h.startswith("_") and _is_method(v) == _is_method(value)]
        near = [former[name]] if name in former else difflib.get_close_matches(name, hooks, n=1, cutoff=0.8)
        if near and near[0] in hooks:
            raise UserError(
                f"class {cls.__name__} defines {name!r}, which {base.__name__} does not use: rename it to {near[0]!r}, "
                "or start its name with an underscore if it is a helper"
            )


def _is_method(value: object) -> bool:
    return callable(value) or isinstance(value, (classmethod, property, staticmethod))


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        round: the current round, from 1 to ``rounds``.
        rounds: number of rounds.
        known: result of `NormStrategy.is_known_client` for this client.
    """

    round: int
    rounds: int
    known: bool = False


@dataclass(frozen=True)
class Update:
    """The message of one client after local training.

    Attributes:
        user: index of the client in the population.
        state: the shared entries after local training.
        examples: number of training examples.
        loss: mean training loss of the round.
        notes: other tensors for the server (`NormStrategy.before_local_training`,
            `NormStrategy.after_local_training`, `fedbn.personalization.base.ClientTrainer.notes`).
    """

    user: int
    state: State
    examples: int
    loss: float
    notes: State = field(default_factory=dict)


Updates = Sequence[Update]


class StackedUpdates(Sequence[Update]):
    """The updates of many clients without notes, with one tensor per entry for all of them.

    A sequence of updates whose tensors are views; `entry_values` and `reported_results` need no updates one by one.

    Attributes:
        users: index of each client.
        tensors: the shared entries ``[N, *shape]`` after local training.
        examples: number of training examples of each client.
        losses: mean training loss of each client.
    """

    def __init__(self, users: list[int], tensors: State, examples: list[int], losses: list[float]) -> None:
        self.users, self.tensors, self.examples, self.losses = users, tensors, examples, losses

    def __len__(self) -> int:
        return len(self.users)

    @overload
    def __getitem__(self, index: int) -> Update: ...
    @overload
    def __getitem__(self, index: slice) -> list[Update]: ...
    def __getitem__(self, index: int | slice) -> Update | list[Update]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        state = {name: t[index] for name, t in self.tensors.items()}
        return Update(self.users[index], state, self.examples[index], self.losses[index])


def entry_values(updates: Updates, name: str) -> Sequence[Tensor] | Tensor:
    """Values of a shared entry: a tensor per client, or ``[N, *shape]`` for `StackedUpdates`."""
    return updates.tensors[name] if isinstance(updates, StackedUpdates) else [u.state[name] for u in updates]


def reported_results(updates: Updates) -> list[tuple[int, int, float]]:
    """Client, number of examples and loss of each update."""
    if isinstance(updates, StackedUpdates):
        return list(zip(updates.users, updates.examples, updates.losses, strict=True))
    return [(u.user, u.examples, u.loss) for u in updates]


@dataclass(frozen=True)
class NormStrategy:
    """Base class of strategies: global BN with all entries shared and statistics averaged like weights.

    A subclass that defines a method or flag with a misspelled or former hook name is refused with a `UserError`.

    Attributes:
        name: name on the command line.
        title: readable name in tables; the name by default.
        aliases: other names.
        about: one-line description.
        source: authors and year.
        body, head, affine, sample_affine, gate, statistics: owner of each role. Counters are always local.
        is_centralized: whether one client trains on all seen users' data (the centralized bound).
        syncs_statistics: whether clients run `sync_statistics` before each evaluation.
        syncs_first_batch: whether clients run `sync_first_batch` before each round of training.
        depends_on_rounds: whether training depends on the total number of rounds, so that a finished run cannot be
            extended.
        needs_cross_entropy: whether the strategy computes the cross-entropy of class indices itself.
        newcomer: description of the initial state of an unseen user.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[str]
    source: ClassVar[str] = ""
    body: ClassVar[Owner] = SHARED
    head: ClassVar[Owner] = SHARED
    affine: ClassVar[Owner] = SHARED
    sample_affine: ClassVar[Owner] = SHARED
    gate: ClassVar[Owner] = SHARED
    statistics: ClassVar[Owner] = SHARED
    is_centralized: ClassVar[bool] = False
    syncs_statistics: ClassVar[bool] = False
    syncs_first_batch: ClassVar[bool] = False
    depends_on_rounds: ClassVar[bool] = False
    needs_cross_entropy: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_misspelled_hooks(cls, NormStrategy, FORMER_HOOKS)

    def owners(self) -> dict[Role, Owner]:
        """Owner of each role."""
        return {role: LOCAL if role is Role.COUNTER else getattr(self, role.value) for role in Role}

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Convert a newly built model, in place or as a new one.

        Raises:
            UserError: the strategy does not apply to this model.
        """
        require_statistics(model, f"strategy {self.name!r}", f", or {FEDAVG}")
        return model

    def validate_population(self, population: Population) -> None:
        """Raise `UserError` if the strategy does not apply to these users (for example without known groups)."""

    def notices(self, clients: int) -> list[str]:
        """Notices about rounds in which as few as ``clients`` clients take part."""
        return []

    def notes_schema(self, model: nn.Module, x: Tensor) -> Schema:
        """Declaration of the tensors that `before_local_training` and `after_local_training` return.

        The server rejects replies with notes that are not declared.

        Args:
            model: the prepared model.
            x: a few rows of the data's shape, with any values.
        """
        return {}

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        """Statistics the client computes on its data before local training. May modify the model in place."""
        return {}

    def sync_first_batch(self, model: nn.Module, batch: Examples, aggregates: Aggregates) -> dict[str, Moments] | None:
        """A client's next message about its first batch of a round (only if ``syncs_first_batch``).

        Args:
            model: the model as received.
            batch: examples of the client's first step.
            aggregates: results of the previous exchanges.

        Returns:
            Moments by name, or None to end the synchronization.
        """
        raise NotImplementedError(f"{self.name} does not synchronize first batches")

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        """Set the model's mode for a round of training, given the results of `sync_first_batch`."""
        model.train()

    def on_before_optimizer_step(self, model: nn.Module) -> None:
        """Inspect or modify the gradients between backward pass and optimizer step."""

    def after_local_training(self, model: nn.Module) -> State:
        """Tensors the client sends besides its entries after training. May write statistics into the model."""
        return {}

    def aggregate_statistics(
        self, updates: Updates, weights: Sequence[float], keys: Sequence[str], old: State, progress: Progress
    ) -> State:
        """New statistics entries ``keys`` of the server, from the updates and its ``old`` entries."""
        return {k: naive_mean(entry_values(updates, k), weights) for k in keys}

    def is_known_client(self, user: int, known: State) -> bool:
        """Whether the server needs no further statistics from a client, given the memory of `group_states`."""
        return False

    def group_of(self, index: int, user: User) -> str:
        """Name of a user's group. Users of one group receive the same state."""
        return ""

    def group_states(
        self, updates: Updates, weights: Sequence[float], table: Ownership, population: Population, known: State
    ) -> dict[str, State]:
        """Entries in which a group's state differs from the server's state, by group, after aggregation.

        Args:
            updates: updates of the clients.
            weights: aggregation weights of the updates.
            table: ownership of the entries.
            population: all users.
            known: memory of this hook between rounds; modified in place.
        """
        return {}

    def sync_statistics(self, model: nn.Module, x: Tensor) -> ConsensusStep:
        """Messages of a client that synchronize statistics after aggregation (only if ``syncs_statistics``)."""
        raise NotImplementedError(f"{self.name} does not synchronize statistics")

    def load_statistics(self, model: nn.Module, aggregates: Aggregates) -> None:
        """Load the results of `sync_statistics` into a model, in place (only if ``syncs_statistics``)."""
        raise NotImplementedError(f"{self.name} does not synchronize statistics")

    def predict_stream(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Logits for a user's unlabeled stream ``x`` if the strategy has its own online adaptation; else None.

        The model keeps its adapted state after the stream.
        """
        return None

    @property
    def newcomer(self) -> str:
        """Description of the initial state of a user that took no part in training."""
        owners = self.owners()
        if owners[Role.BODY] is LOCAL:
            return "none: no model is shared"
        origin = {SHARED: "the server's", SEEDED: "the mean of the clients'", LOCAL: "initial"}
        statistics, affine = (origin[owners[role]] for role in (Role.STATISTICS, Role.AFFINE))
        if statistics == affine:
            return f"{statistics} statistics, scale and shift"
        return f"{statistics} statistics; {affine} scale and shift"


class LayerStrategy(NormStrategy):
    """Base class of strategies that replace the layers with batch statistics; others, such as LayerNorm, stay.

    Attributes:
        kind: kind of the new layers in `fedbn.nn.conversion.convert`, with the strategy's fields as options.
    """

    kind: ClassVar[str]

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert(super().prepare_model(model), self.kind, **asdict(self))


class StatelessNorm(LayerStrategy):
    """Base class of strategies that use a method without running statistics instead."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert(model, self.kind, **asdict(self))

    @property
    def newcomer(self) -> str:
        return "the server's model; there are no statistics"


class StatelessLayer(StatelessNorm):
    """Base class of strategies that replace the layers with batch statistics by layers without statistics."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        require_batch_norm(model, f"strategy {self.name!r}")
        return super().prepare_model(model)


def strategies() -> dict[str, type[NormStrategy]]:
    """All available strategies, by name."""
    return discover("fedbn.strategies", NormStrategy)


def strategy(text: str) -> NormStrategy:
    """Parse a strategy such as ``fedbn`` or ``groupnorm:groups=4``.

    Raises:
        UserError: unknown strategy or option; the message suggests the nearest one.
    """
    return parse(text, "strategy", strategies(), NormStrategy)
