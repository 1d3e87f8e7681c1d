"""The server's part of a round: aggregation, served states, the learning curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from fedbn.federation.context import RunContext
from fedbn.federation.metrics import COLUMNS, Column, Score
from fedbn.federation.protection import opened
from fedbn.federation.traffic import Traffic
from fedbn.nn.roles import Role, State, clone
from fedbn.statistics.consensus import Aggregates
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
        groups: entries in which some clients' states differ from ``state``, by view.
        known: what the strategy remembers for its views.
        broadcast: what the personalization method tells all clients besides the model.
        client_statistics: the last statistics that each client sent, for newcomers to start from.
    """

    state: State
    serving: State
    memory: State = field(default_factory=dict)
    groups: dict[str, State] = field(default_factory=dict)
    known: State = field(default_factory=dict)
    broadcast: State = field(default_factory=dict)
    client_statistics: dict[int, State] = field(default_factory=dict)

    def advance(
        self,
        ctx: RunContext,
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
        secure = ctx.privacy is not None and ctx.privacy.secure
        if secure:
            updates = [opened(ctx, updates, self.state, round)]
        weights = [ctx.weight(u.examples) for u in updates]
        table = ctx.ownership
        statistics = [k for k in table.travels if table.roles[k] is Role.STATISTICS]
        parameters = [k for k in table.travels if table.roles[k] is not Role.STATISTICS]
        new = {k: naive_mean([u.state[k] for u in updates], weights) for k in parameters}
        if step is not None and new:
            new, self.memory = step(round, {k: self.state[k] for k in parameters}, new, self.memory)
        if statistics:
            old = {k: self.state[k] for k in statistics}
            new |= ctx.strategy.aggregate_statistics(
                updates, weights, statistics, old, Progress(round, ctx.run.plan.rounds)
            )
        self.groups |= ctx.strategy.group_states(updates, weights, table, ctx.population, self.known)
        self.broadcast = ctx.personal.server_broadcast(updates, self.broadcast, len(ctx.trainers))
        if not ctx.strategy.is_centralized and not secure:
            owned = [k for k in table.travels if table.roles[k] is Role.STATISTICS or table.owner(k) is SEEDED]
            self.client_statistics |= {u.user: {k: u.state[k] for k in owned} for u in updates if owned}
        self.state = {k: new[k] for k in table.travels}
        self.serving = self.state

    def sends(self, ctx: RunContext, user: int, *, serving: bool = False) -> State:
        """The entries that one user is sent, for training or for evaluation."""
        common = self.serving if serving else self.state
        return common | self.groups.get(ctx.group_of(user), {}) if self.groups else common


@dataclass(frozen=True)
class RoundMetrics:
    """One round on the curve: training loss, and mean accuracies as aggregated where the round was evaluated."""

    round: int
    train_loss: float
    own: float | None = None
    unseen: float | None = None


@dataclass(frozen=True)
class ClientFailure:
    """Something that went wrong in a round and was survived."""

    round: int
    text: str


@dataclass
class Outcome:
    """A finished run.

    Attributes:
        server: final server state.
        client_states: what each user that trained keeps, by index.
        curve: one point a round.
        scores: the evaluation matrix's cells by user index.
        seconds: time spent in this process, training and evaluation.
        failures: what was survived.
        traffic: what has travelled besides entries.
        trained: the last round of each user whose training counted.
    """

    server: Server
    client_states: dict[int, State] = field(default_factory=dict)
    curve: list[RoundMetrics] = field(default_factory=list)
    scores: dict[int, list[Score]] = field(default_factory=dict)
    seconds: float = 0.0
    failures: list[ClientFailure] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    trained: dict[int, int] = field(default_factory=dict)

    def notices(self) -> list[str]:
        """What was survived, in a sentence; nothing if nothing was."""
        if not self.failures:
            return []
        first = self.failures[0]
        return [f"{len(self.failures)} faults were survived; the first, in round {first.round}: {first.text}"]


def with_synced_statistics(ctx: RunContext, state: State, answers: Sequence[dict[str, Moments]]) -> State:
    """``state`` with its statistics replaced by those that the clients agreed on."""
    model: nn.Module = ctx.load(ctx.assemble(state, None))
    ctx.strategy.load_statistics(model, answers)
    agreed = clone(statistics_of(model))
    return {k: agreed.get(k, v) for k, v in state.items()}


def is_evaluated(ctx: RunContext, round: int) -> bool:
    """Whether a round gets a point with accuracies on the curve."""
    return round % ctx.run.plan.eval_every == 0 or round == ctx.run.plan.rounds


def global_columns(ctx: RunContext, user: int) -> tuple[Column, ...]:
    """The columns in which a user's model meets the pooled test set in the end.

    As aggregated, every seen user's model does, or one user's where all models are the same.
    """
    if user in ctx.population.unseen or ctx.population.remote:  # nobody has all users' test rows
        return ()
    personal = ctx.ownership.personal or ctx.treatment.personalizes or user == ctx.population.seen[0]
    return COLUMNS if personal else COLUMNS[1:]


def served_users(ctx: RunContext) -> list[int]:
    """Users with a model: everybody, except unseen users where no model is shared."""
    is_local_only = ctx.treatment.is_local_only
    return [i for i in range(len(ctx.population.users)) if not (is_local_only and i in ctx.population.unseen)]


def mean_accuracy(ctx: RunContext, scores: dict[int, list[Score]], unseen: bool) -> float | None:
    """Mean over users of own accuracy as aggregated."""
    users = ctx.population.unseen if unseen else ctx.population.seen
    values = [
        s.accuracy
        for i in users
        for s in scores.get(i, [])
        if s.column == "aggregated" and s.row == ("unseen" if unseen else "own")
    ]
    return sum(values) / len(values) if values else None


def mean_loss(updates: Sequence[Update]) -> float:
    """Training loss over all examples of a round."""
    total = sum(u.examples for u in updates)
    return sum(u.loss * u.examples for u in updates) / total


def traffic_counter(
    ctx: RunContext, out: Outcome, purpose: str
) -> Callable[[Aggregates, Sequence[dict[str, Moments] | None]], None]:
    """Counts the exchanges of a conversation for an outcome."""
    return partial(out.traffic.talked, purpose, sum(ctx.ownership.sizes[k] for k in ctx.ownership.travels))
