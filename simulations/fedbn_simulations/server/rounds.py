"""The server's loop: the rounds of a run over the nodes of a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedbn.errors import UserError
from fedbn.federation.cold_start import statistics_for, summarize
from fedbn.federation.context import RunContext
from fedbn.federation.convergence import is_last_round, losses, remaining_rounds
from fedbn.federation.labeled_sums import collect_sums, sums_schema
from fedbn.federation.metrics import COLUMNS, Score
from fedbn.federation.run import Run
from fedbn.federation.server import (
    ClientFailure,
    Outcome,
    RoundMetrics,
    Server,
    diverged_client,
    global_columns,
    is_evaluated,
    mean_loss,
    mean_metric,
    served_users,
    traffic_counter,
    with_synced_statistics,
)
from fedbn.federation.setup import build_context
from fedbn.nn.roles import State
from fedbn.nn.schema import NO_LIMITS, Schema
from fedbn.online.sums import SumsMethod
from fedbn.plugins import render
from fedbn.statistics.consensus import run_consensus
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress, StackedUpdates, Update
from fedbn_clients.records import aggregates_to, client_statistics_to
from fedbn_simulations.server.clock import cpu_seconds, wall_seconds
from fedbn_simulations.server.keys import UserKeys
from fedbn_simulations.server.nodes import REPLY_SECONDS, WAIT_SECONDS, NodePool
from fedbn_simulations.server.optimizer import server_step
from fedbn_simulations.server.safeguards import SIMULATION, Safeguards
from fedbn_simulations.server.validation import ReplyValidator


@dataclass(frozen=True)
class Listener:
    """Callbacks and resume state of an in-process run.

    Attributes:
        resume: partial outcome from which the run continues.
        on_round: called with the round and the outcome after each round.
        on_end: called with the complete outcome.
    """

    resume: Outcome | None = None
    on_round: Callable[[int, Outcome], None] | None = None
    on_end: Callable[[Outcome], None] | None = None


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def attach_listener(listener: Listener) -> Iterator[None]:
    """Attach a listener to the runs in this context."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def run_rounds(
    grid: Grid,
    run: Run,
    listener: Listener | None = None,
    timeout: float = REPLY_SECONDS,
    wait: float = WAIT_SECONDS,
    keys: UserKeys | None = None,
    safeguards: Safeguards = SIMULATION,
    sums: Sequence[str] = (),
) -> Outcome:
    """Run a federation over the nodes of a grid.

    The operations and their order are those of `fedbn.federation.loop.federate`, so the results are bit-identical.

    Args:
        grid: grid of the nodes.
        run: run to execute.
        listener: callbacks and resume state.
        timeout: seconds to wait for the replies to an exchange.
        wait: seconds to wait until every user has a node.
        keys: public keys of the users' nodes; None: nodes are trusted to name their user.
        safeguards: limits of what clients send, and what they receive about each other.
        sums: alignments and heads for which the seen clients send sums after training.

    Raises:
        UserError: the run has invalid settings.
        ClientError: a client failed.
    """
    listener = listener or Listener()
    ctx = build_context(run)
    step = server_step(run.plan)
    if run.plan.tolerate and ctx.privacy is not None and ctx.privacy.secure:
        raise UserError("secure sums need every client of a round: remove secure=true or tolerate")
    nodes = NodePool(grid, len(ctx.population.users), run.plan.tolerate, timeout, wait, keys)
    validator = ReplyValidator(ctx, safeguards.limits, simulated=getattr(grid, "shares_memory", False))
    start, cpu_start = wall_seconds(), cpu_seconds()
    out = listener.resume or Outcome(Server(ctx.initial_server_state(), ctx.initial_server_state()))
    nodes.trained = out.trained
    previous_seconds, previous_cpu = out.seconds, out.cpu_seconds
    for number in remaining_rounds(ctx, out):
        sampled = ctx.sample_clients(number)
        aggregates = _sync_first_batch(validator, nodes, out, number, sampled) if ctx.strategy.syncs_first_batch else []
        updates = _train(validator, nodes, out.server, number, sampled, aggregates)
        out.traffic.count_round(updates, out.server.broadcast, aggregates)
        out.server.advance(ctx, updates, number, step)
        loss, diverged = mean_loss(updates), diverged_client(ctx, updates)
        del updates  # with thousands of clients, the largest part of the memory
        last = is_last_round(ctx, [*losses(out), loss])
        if is_evaluated(ctx, number) and ctx.strategy.syncs_statistics:
            out.server.serving = _sync_statistics(validator, nodes, out)
        cold_starts = safeguards.client_statistics
        scores = {}
        if is_evaluated(ctx, number):
            scores = _evaluate(validator, nodes, out.server, last=last, cold_starts=cold_starts)
        if last:
            out.scores = scores
        point = RoundMetrics(
            number,
            loss,
            mean_metric(ctx, scores, unseen=False),
            mean_metric(ctx, scores, unseen=True),
            diverged,
        )
        out.curve.append(point)
        out.failures += [ClientFailure(number, text) for text in nodes.failures]
        nodes.failures.clear()
        out.seconds = previous_seconds + wall_seconds() - start
        out.cpu_seconds = previous_cpu + cpu_seconds() - cpu_start
        if listener.on_round:
            listener.on_round(number, out)
    if missing := [text for text in sums if text not in out.sums]:
        out.sums |= collect_sums(ctx, missing, partial(_send_sums, validator, nodes, out))
        out.failures += [ClientFailure(len(out.curve), text) for text in nodes.failures]
        if listener.on_round:
            listener.on_round(len(out.curve), out)
    if listener.on_end:
        listener.on_end(out)
    return out


def _send_sums(
    validator: ReplyValidator, nodes: NodePool, out: Outcome, method: SumsMethod, number: int, received: State
) -> list[State]:
    """Ask the seen clients for the sums of one round."""
    record, schema = nodes.record(out.server.serving), sums_schema(validator.ctx, method)
    content = RecordDict({"arrays": record, "config": ConfigRecord({"method": render(method), "number": number})})
    if received:
        content["broadcast"] = nodes.record(received)

    def read(user: int, reply: RecordDict) -> State:
        return validator.sums(user, reply, schema)

    messages = list(
        nodes.send("query.labeled_sums", dict.fromkeys(validator.ctx.population.seen, content), read).values()
    )
    out.traffic.count_sums(received, messages)
    return messages


def _outgoing(
    ctx: RunContext, nodes: NodePool, server: Server, users: Sequence[int], *, serving: bool = False
) -> dict[int, ArrayRecord]:
    """Records for the users; users of one group share a record."""
    records: dict[str, ArrayRecord] = {}
    for user in users:
        if (view := ctx.group_of(user)) not in records:
            records[view] = nodes.record(server.state_for(ctx, user, serving=serving))
    return {user: records[ctx.group_of(user)] for user in users}


def _config(ctx: RunContext, number: int, trained: int, known: bool = False) -> ConfigRecord:
    return ConfigRecord({"round": number, "rounds": ctx.run.plan.rounds, "known": known, "trained": trained})


def _sync_first_batch(
    validator: ReplyValidator, nodes: NodePool, out: Outcome, number: int, sampled: Sequence[int]
) -> list[dict[str, Moments]]:
    ctx = validator.ctx
    outgoing = _outgoing(ctx, nodes, out.server, sampled)

    def content(user: int) -> RecordDict:
        return RecordDict({"arrays": outgoing[user], "config": _config(ctx, number, nodes.trained.get(user, 0))})

    exchanges = validator.schemas.first_batch_exchanges
    kind = "query.sync_first_batch"
    return _exchange_moments(validator, nodes, out, "first-batch sync", kind, exchanges, sampled, content)


def _train(
    validator: ReplyValidator,
    nodes: NodePool,
    server: Server,
    number: int,
    sampled: list[int],
    aggregates: list[dict[str, Moments]],
) -> Sequence[Update]:
    ctx = validator.ctx
    if (stacked := _train_cohort(validator, nodes, server, number, sampled, aggregates)) is not None:
        return stacked
    outgoing = _outgoing(ctx, nodes, server, sampled)
    common = aggregates_to(aggregates)
    if server.broadcast:
        common["broadcast"] = nodes.record(server.broadcast)

    contents: dict[tuple[str, int, bool], RecordDict] = {}  # shared by users with the same content

    def content(user: int) -> RecordDict:
        key = ctx.group_of(user), nodes.trained.get(user, 0), ctx.strategy.is_known_client(user, server.known)
        if key not in contents:
            config = _config(ctx, number, *key[1:])
            contents[key] = RecordDict({"arrays": outgoing[user], "config": config, **common})
        return contents[key]

    def read(user: int, reply: RecordDict) -> Update:
        return validator.update(user, reply, server.state_for(ctx, user))

    updates = nodes.send("train", {u: content(u) for u in sampled}, read)
    nodes.trained |= dict.fromkeys(updates, number)
    return list(updates.values())


def _train_cohort(
    validator: ReplyValidator,
    nodes: NodePool,
    server: Server,
    number: int,
    sampled: list[int],
    aggregates: list[dict[str, Moments]],
) -> StackedUpdates | None:
    """Updates of all clients from one call of a grid in this process; None if the clients need messages."""
    ctx = validator.ctx
    if (
        not getattr(nodes.grid, "trains_cohorts", False)
        or aggregates
        or server.broadcast
        or ctx.privacy is not None
        or ctx.population.remote
        or ctx.strategy.is_centralized
        or validator.limits != NO_LIMITS
        or any(user not in nodes.node for user in sampled)
    ):
        return None
    received = [server.state_for(ctx, user) for user in sampled] if server.groups else [server.state] * len(sampled)
    progress = Progress(number, ctx.run.plan.rounds, ctx.strategy.is_known_client(sampled[0], server.known))
    trained = nodes.trained.keys() & set(sampled)
    updates: StackedUpdates | None = cast(Any, nodes.grid).train_cohort(sampled, received, progress, trained)
    if updates is not None:
        validator.stacked_updates(updates)
        nodes.trained |= dict.fromkeys(sampled, number)
    return updates


def _sync_statistics(validator: ReplyValidator, nodes: NodePool, out: Outcome) -> State:
    ctx = validator.ctx
    record = nodes.record(out.server.state)

    def content(user: int) -> RecordDict:
        return RecordDict({"arrays": record, "config": ConfigRecord({"trained": nodes.trained.get(user, 0)})})

    exchanges, kind = validator.schemas.statistics_exchanges, "query.sync_statistics"
    moments = _exchange_moments(validator, nodes, out, "statistics sync", kind, exchanges, ctx.trainers, content)
    return with_synced_statistics(ctx, out.server.state, moments)


def _exchange_moments(
    validator: ReplyValidator,
    nodes: NodePool,
    out: Outcome,
    purpose: str,
    kind: str,
    exchanges: Sequence[Schema],
    users: Sequence[int],
    content: Callable[[int], RecordDict],
) -> list[dict[str, Moments]]:
    """Exchange moments with the users until their statistics agree. Returns the aggregate of each exchange."""

    def exchange(aggregates: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        records = aggregates_to(aggregates)
        contents = {user: RecordDict({**content(user), **records}) for user in users}

        def read(user: int, reply: RecordDict) -> dict[str, Moments] | None:
            return validator.moments(user, reply, exchanges, len(aggregates))

        return list(nodes.send(kind, contents, read).values())

    return list(run_consensus(exchange, traffic_counter(validator.ctx, out, purpose)))


def _evaluate(
    validator: ReplyValidator, nodes: NodePool, server: Server, *, last: bool, cold_starts: bool
) -> dict[int, list[Score]]:
    ctx = validator.ctx
    users = served_users(ctx)
    outgoing = _outgoing(ctx, nodes, server, users, serving=True)
    columns = COLUMNS if last else COLUMNS[:1]
    globally = {user: global_columns(ctx, user) if last else () for user in users}
    summary = summarize(ctx, server.client_statistics) if last else None
    statistics = {user: statistics_for(ctx, user, summary, cold_starts=cold_starts) for user in users}
    records = {id(s): client_statistics_to(s) for s in statistics.values() if s is not None}

    def content(user: int) -> RecordDict:
        config = ConfigRecord({"columns": [str(c) for c in columns], "globally": [str(c) for c in globally[user]]})
        config["trained"], config["final"] = nodes.trained.get(user, 0), last
        content = RecordDict({"arrays": outgoing[user], "config": config})
        if (sent := statistics[user]) is not None:
            content["client_statistics"] = records[id(sent)]
        return content

    def read(user: int, reply: RecordDict) -> list[Score]:
        return validator.scores(user, reply, columns, globally[user], cold_starts=statistics[user] is not None)

    return nodes.send("evaluate", {user: content(user) for user in users}, read)
