"""The server's part of a round: aggregation, states for users, and the learning curve."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from fedbn.federation.client_table import ClientTable
from fedbn.federation.context import CENTRAL_TRAINER, RunContext
from fedbn.federation.metrics import COLUMNS, Column, Score
from fedbn.federation.protection import unmask_mean
from fedbn.federation.traffic import Traffic
from fedbn.nn.roles import Role, State, clone
from fedbn.statistics.consensus import Aggregates
from fedbn.statistics.moments import Moments, naive_mean
from fedbn.statistics.recalibration import statistics_of
from fedbn.strategies.base import Progress, StackedUpdates, Update, entry_values, reported_results
from fedbn.strategies.ownership import SEEDED

ServerStep = Callable[[int, State, State, State], tuple[State, State]]
"""Server optimizer step: (round, old parameters, mean of the clients, memory) -> (new parameters, memory)."""


@dataclass
class Server:
    """State of the server between rounds.

    Attributes:
        state: the shared entries.
        serving: the shared entries for evaluation, with synchronized statistics if the strategy synchronizes them.
        memory: state of the server optimizer.
        groups: entries in which a group's state differs from ``state``, by group.
        known: the strategy's memory for `NormStrategy.group_states`.
        broadcast: tensors of the personalization method that are sent to all clients besides the model.
        client_statistics: the last statistics sent by each client, for cold starts of unseen users.
    """

    state: State
    serving: State
    memory: State = field(default_factory=dict)
    groups: dict[str, State] = field(default_factory=dict)
    known: State = field(default_factory=dict)
    broadcast: State = field(default_factory=dict)
    client_statistics: MutableMapping[int, State] = field(default_factory=dict)

    def advance(self, ctx: RunContext, updates: Sequence[Update], round: int, step: ServerStep | None = None) -> None:
        """Aggregate the updates of a round.

        Parameters take the weighted mean and the server's optimizer step; statistics are aggregated by the strategy.

        Raises:
            ValueError: no updates.
        """
        if not updates:
            raise ValueError("nothing to aggregate")
        secure = ctx.privacy is not None and ctx.privacy.secure
        if secure:
            updates = [unmask_mean(ctx, updates, self.state, round)]
        weights = [ctx.weight(examples) for _, examples, _ in reported_results(updates)]
        table = ctx.ownership
        statistics, parameters = table.shared_statistics, table.shared_parameters
        new = {k: naive_mean(entry_values(updates, k), weights) for k in parameters}
        if step is not None and new:
            new, self.memory = step(round, {k: self.state[k] for k in parameters}, new, self.memory)
        if statistics:
            old, progress = {k: self.state[k] for k in statistics}, Progress(round, ctx.run.plan.rounds)
            new |= ctx.strategy.aggregate_statistics(updates, weights, statistics, old, progress)
        self.groups |= ctx.strategy.group_states(updates, weights, table, ctx.population, self.known)
        self.broadcast = ctx.personal.server_broadcast(updates, self.broadcast, len(ctx.trainers))
        if not ctx.strategy.is_centralized and not secure:
            owned = [k for k in table.travels if table.roles[k] is Role.STATISTICS or table.owner(k) is SEEDED]
            if owned:
                self._record_statistics(ctx, updates, owned)
        self.state = {k: new[k] for k in table.travels}
        self.serving = self.state

    def _record_statistics(self, ctx: RunContext, updates: Sequence[Update], names: Sequence[str]) -> None:
        if isinstance(updates, StackedUpdates):
            self.client_statistics = ClientTable.of(self.client_statistics, ctx.trainers)
            self.client_statistics.write(updates.users, {k: updates.tensors[k] for k in names})
        else:
            self.client_statistics.update({u.user: {k: u.state[k] for k in names} for u in updates})

    def state_for(self, ctx: RunContext, user: int, *, serving: bool = False) -> State:
        """Shared entries for one user, for training or (``serving``) for evaluation."""
        state = self.serving if serving else self.state
        return state | self.groups.get(ctx.group_of(user), {}) if self.groups else state


@dataclass(frozen=True)
class RoundMetrics:
    """Training loss of a round and, if it was evaluated, the task's main metric for seen and unseen users.

    ``diverged`` is the name of the first client whose training loss is not finite.
    """

    round: int
    train_loss: float
    own: float | None = None
    unseen: float | None = None
    diverged: str | None = None


@dataclass(frozen=True)
class ClientFailure:
    """A client failure that the run tolerated."""

    round: int
    text: str


@dataclass
class Outcome:
    """Result of a run, complete after the last round.

    Attributes:
        server: final server state.
        client_states: client state of each user that trained, by index.
        curve: metrics of each round.
        scores: cells of the evaluation matrix, by user index.
        seconds: time spent on training and evaluation in this process.
        cpu_seconds: CPU time of this process in it, of all its threads.
        phases: CPU time by phase, such as ``training``; empty for engines that do not measure it.
        failures: tolerated client failures.
        traffic: bytes sent besides the model's entries.
        trained: last round in which each user's training was aggregated.
        sums: results of the labeled sums of seen clients (`fedbn.federation.labeled_sums`), by alignment or head.
        execution: how an executor ran the jobs, by kind (`fedbn.stacked.executors.Execution`); empty without one.
    """

    server: Server
    client_states: MutableMapping[int, State] = field(default_factory=dict)
    curve: list[RoundMetrics] = field(default_factory=list)
    scores: dict[int, list[Score]] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    trained: dict[int, int] = field(default_factory=dict)
    sums: dict[str, State] = field(default_factory=dict)
    execution: dict[str, list[str]] = field(default_factory=dict)

    def notices(self) -> list[str]:
        """Notices about diverged training and tolerated failures."""
        notices: list[str] = []
        if diverged := next((point for point in self.curve if point.diverged is not None), None):
            notices.append(
                f"training diverged: the loss of {diverged.diverged} became NaN or infinite in round {diverged.round}; "
                "use a smaller --lr, --warmup or --max-grad-norm"
            )
        if self.failures:
            first = self.failures[0]
            notices.append(
                f"{len(self.failures)} client failures were tolerated; the first, in round {first.round}: {first.text}"
            )
        return notices


def with_synced_statistics(ctx: RunContext, state: State, aggregates: Aggregates) -> State:
    """``state`` with the statistics that the clients synchronized."""
    model: nn.Module = ctx.load(ctx.assemble(state, None))
    ctx.strategy.load_statistics(model, aggregates)
    synced = clone(statistics_of(model))
    return {k: synced.get(k, v) for k, v in state.items()}


def is_evaluated(ctx: RunContext, round: int) -> bool:
    """Whether the users are evaluated after a round."""
    return round % ctx.run.plan.eval_every == 0 or round == ctx.run.plan.rounds


def global_columns(ctx: RunContext, user: int) -> tuple[Column, ...]:
    """Columns of the final evaluation in which a user's model is also scored on the pooled test set.

    *aggregated* is scored for every seen user, or for the first one only if all models are equal.
    """
    if user in ctx.population.unseen or ctx.population.remote:  # no node has the test rows of all users
        return ()
    personal = ctx.ownership.personal or ctx.treatment.personalizes or user == ctx.population.seen[0]
    return COLUMNS if personal else COLUMNS[1:]


def served_users(ctx: RunContext) -> list[int]:
    """Users that have a model: all users, without the unseen ones if no model is shared."""
    without_model = ctx.population.unseen if ctx.treatment.is_local_only else ()
    return [i for i in range(len(ctx.population.users)) if i not in without_model]


def mean_metric(ctx: RunContext, scores: dict[int, list[Score]], unseen: bool) -> float | None:
    """Mean over users of the task's main metric on their own test data in the *aggregated* column."""
    users, row = (ctx.population.unseen, "unseen") if unseen else (ctx.population.seen, "own")
    cells = [s for i in users for s in scores.get(i, []) if (s.row, s.column) == (row, "aggregated")]
    values = [s.metrics[ctx.task.main_metric] for s in cells if ctx.task.main_metric in s.metrics]
    return sum(values) / len(values) if values else None


def mean_loss(updates: Sequence[Update]) -> float:
    """Mean training loss over all examples of a round."""
    results = reported_results(updates)
    return sum(loss * examples for _, examples, loss in results) / sum(examples for _, examples, _ in results)


def diverged_client(ctx: RunContext, updates: Sequence[Update]) -> str | None:
    """Name of the first client whose training loss is not finite; None if there is none."""
    user = next((user for user, _, loss in reported_results(updates) if not math.isfinite(loss)), None)
    if user is None:
        return None
    return "the central trainer" if user == CENTRAL_TRAINER else f"user {ctx.population.users[user].name}"


def traffic_counter(
    ctx: RunContext, out: Outcome, purpose: str
) -> Callable[[Aggregates, Sequence[dict[str, Moments] | None]], None]:
    """Callback that counts the exchanges of a synchronization in an outcome's traffic."""
    return partial(out.traffic.count_exchange, purpose, sum(ctx.ownership.sizes[k] for k in ctx.ownership.travels))
