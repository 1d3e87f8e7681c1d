"""The server's part of a round: aggregation, served states, the learning curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from fedbn.federation.context import Setting
from fedbn.federation.metrics import COLUMNS, Column, Score
from fedbn.federation.protection import opened
from fedbn.federation.traffic import Traffic
from fedbn.nn.roles import Role, State, clone
from fedbn.statistics.consensus import Heard
from fedbn.statistics.moments import Moments, naive_mean
from fedbn.statistics.recalibration import statistics_of
from fedbn.strategies.base import Progress, Update
from fedbn.strategies.ownership import SEEDED

ServerStep = Callable[[int, State, State, State], tuple[State, State]]
"""How the server moves its parameters: (round, old, mean of the clients', memory) -> (new, memory)."""


@dataclass
class Server:
    """What the server knows between rounds.

    Attributes:
        state: entries that travel.
        serving: the same with statistics that the strategy settled for evaluation.
        memory: what the server's optimizer remembers.
        views: entries in which some clients' states differ from ``state``, by view.
        known: what the strategy remembers for its views.
        told: what the personalization method tells all clients besides the model.
        registry: the last statistics that each client sent, for newcomers to start from.
    """

    state: State
    serving: State
    memory: State = field(default_factory=dict)
    views: dict[str, State] = field(default_factory=dict)
    known: State = field(default_factory=dict)
    told: State = field(default_factory=dict)
    registry: dict[int, State] = field(default_factory=dict)

    def advance(
        self,
        here: Setting,
        updates: Sequence[Update],
        round: int,
        step: ServerStep | None = None,
    ) -> None:
        """Aggregate: parameters by weighted mean and server step, statistics by the strategy's pool.

        Raises:
            ValueError: no updates.
        """
        if not updates:
            raise ValueError("nothing to aggregate")
        secure = here.privacy is not None and here.privacy.secure
        if secure:
            updates = [opened(here, updates, self.state, round)]
        weights = [here.weight(u.examples) for u in updates]
        table = here.ownership
        statistics = [k for k in table.travels if table.roles[k] is Role.STATISTICS]
        parameters = [k for k in table.travels if table.roles[k] is not Role.STATISTICS]
        new = {k: naive_mean([u.state[k] for u in updates], weights) for k in parameters}
        if step is not None and new:
            new, self.memory = step(round, {k: self.state[k] for k in parameters}, new, self.memory)
        if statistics:
            old = {k: self.state[k] for k in statistics}
            new |= here.strategy.pool(updates, weights, statistics, old, Progress(round, here.run.plan.rounds))
        self.views |= here.strategy.views(updates, weights, table, here.population, self.known)
        self.told = here.personal.tell(updates, self.told, len(here.trainers))
        if not here.strategy.gathers and not secure:
            owned = [k for k in table.travels if table.roles[k] is Role.STATISTICS or table.owner(k) is SEEDED]
            self.registry |= {u.user: {k: u.state[k] for k in owned} for u in updates if owned}
        self.state = {k: new[k] for k in table.travels}
        self.serving = self.state

    def sends(self, here: Setting, user: int, *, serving: bool = False) -> State:
        """The entries that one user is sent, for training or for evaluation."""
        common = self.serving if serving else self.state
        return common | self.views.get(here.view(user), {}) if self.views else common


@dataclass(frozen=True)
class Point:
    """One round on the curve: training loss, and mean accuracies as aggregated where the round was evaluated."""

    round: int
    train_loss: float
    own: float | None = None
    unseen: float | None = None


@dataclass(frozen=True)
class Fault:
    """Something that went wrong in a round and was survived."""

    round: int
    text: str


@dataclass
class Outcome:
    """A finished run.

    Attributes:
        server: final server state.
        kept: what each user that trained keeps, by index.
        curve: one point a round.
        scores: the evaluation matrix's cells by user index.
        seconds: time spent in this process, training and evaluation.
        faults: what was survived.
        traffic: what has travelled besides entries.
        trained: the last round of each user whose training counted.
    """

    server: Server
    kept: dict[int, State] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    scores: dict[int, list[Score]] = field(default_factory=dict)
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    trained: dict[int, int] = field(default_factory=dict)

    def notices(self) -> list[str]:
        """What was survived, in a sentence; nothing if nothing was."""
        if not self.faults:
            return []
        first = self.faults[0]
        return [f"{len(self.faults)} faults were survived; the first, in round {first.round}: {first.text}"]


def settled(here: Setting, state: State, answers: Sequence[dict[str, Moments]]) -> State:
    """``state`` with its statistics replaced by those that the clients agreed on."""
    model: nn.Module = here.load(here.assemble(state, None))
    here.strategy.adopt(model, answers)
    agreed = clone(statistics_of(model))
    return {k: agreed.get(k, v) for k, v in state.items()}


def evaluated(here: Setting, round: int) -> bool:
    """Whether a round gets a point with accuracies on the curve."""
    return round % here.run.plan.eval_every == 0 or round == here.run.plan.rounds


def global_columns(here: Setting, user: int) -> tuple[Column, ...]:
    """The columns in which a user's model meets the pooled test set in the end.

    As aggregated, every seen user's model does, or one user's where all models are the same.
    """
    if user in here.population.unseen or here.population.remote:  # nobody has all users' test rows
        return ()
    personal = here.ownership.personal or here.treatment.personalizes or user == here.population.seen[0]
    return COLUMNS if personal else COLUMNS[1:]


def served(here: Setting) -> list[int]:
    """Users with a model: everybody, except unseen users where no model is shared."""
    lonely = here.treatment.lonely
    return [i for i in range(len(here.population.users)) if not (lonely and i in here.population.unseen)]


def mean_accuracy(here: Setting, scores: dict[int, list[Score]], unseen: bool) -> float | None:
    """Mean over users of own accuracy as aggregated."""
    people = here.population.unseen if unseen else here.population.seen
    values = [
        s.accuracy
        for i in people
        for s in scores.get(i, [])
        if s.column == "aggregated" and s.row == ("unseen" if unseen else "own")
    ]
    return sum(values) / len(values) if values else None


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss over all examples of a round."""
    total = sum(u.examples for u in updates)
    return sum(u.loss * u.examples for u in updates) / total


def counting(here: Setting, out: Outcome, purpose: str) -> Callable[[Heard, Sequence[dict[str, Moments] | None]], None]:
    """Counts the exchanges of a conversation for an outcome."""
    return partial(out.traffic.talked, purpose, sum(here.ownership.sizes[k] for k in here.ownership.travels))
