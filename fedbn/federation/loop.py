"""The reference loop: federated training in one process, as plain functions.

Clients run `client_round`, `client_evaluation` and `client_sync_statistics`; the server runs `Server.advance` and
`with_synced_statistics`. The Flower apps call the same functions, and every engine is tested against `federate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from fedbn.federation.client import client_evaluation, client_round, client_sync_first_batch, client_sync_statistics
from fedbn.federation.cold_start import statistics_for, summarize
from fedbn.federation.context import RunContext
from fedbn.federation.convergence import is_last_round, losses, remaining_rounds
from fedbn.federation.failures import client_name, reported
from fedbn.federation.labeled_sums import client_sums, collect_sums
from fedbn.federation.metrics import COLUMNS, Score
from fedbn.federation.protection import protect_update
from fedbn.federation.run import Run
from fedbn.federation.server import (
    Outcome,
    RoundMetrics,
    Server,
    ServerStep,
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
from fedbn.online.sums import SumsMethod
from fedbn.statistics.consensus import run_consensus
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress


def federate(
    run: Run,
    *,
    ctx: RunContext | None = None,
    step: ServerStep | None = None,
    resume: Outcome | None = None,
    on_round: Callable[[int, Outcome], None] | None = None,
    sums: Sequence[str] = (),
) -> Outcome:
    """Run federated training in one process, as the reference for every engine.

    Args:
        run: the run.
        ctx: the run's context; built by `build_context` by default.
        step: the server's optimizer step on parameters; by default the server takes the mean.
        resume: an unfinished outcome to resume.
        on_round: callback after each round, with its number and the outcome.
        sums: alignments and heads for which the clients send sums after training, such as ``matched``.

    Raises:
        ClientError: a client raised an exception; its content is in the clients' log only.

    >>> from fedbn.config import Plan
    >>> run = Run("digits8", "fedbn", plan=Plan(rounds=1, eval_every=1))
    >>> len(federate(run).curve)
    1
    """
    ctx = ctx or build_context(run)
    start, cpu_start = time.perf_counter(), time.process_time()
    out = resume or Outcome(Server(ctx.initial_server_state(), ctx.initial_server_state()))
    previous_seconds, previous_cpu = out.seconds, out.cpu_seconds
    for number in remaining_rounds(ctx, out):
        progress = Progress(number, run.plan.rounds)
        sampled = ctx.sample_clients(number)
        aggregates = list(_sync_first_batch(ctx, out, sampled, progress)) if ctx.strategy.syncs_first_batch else []
        updates = []
        for user in sampled:
            received = out.server.state_for(ctx, user)
            client_progress = replace(progress, known=ctx.strategy.is_known_client(user, out.server.known))
            with reported(f"train, {client_name(user)}, round {number}"):
                update, client_state = client_round(
                    ctx, user, received, out.client_states.get(user), client_progress, aggregates, out.server.broadcast
                )
                updates.append(protect_update(ctx, update, received, client_progress))
            out.client_states[user] = client_state
        out.trained |= dict.fromkeys(sampled, number)
        out.traffic.count_round(updates, out.server.broadcast, aggregates)
        out.server.advance(ctx, updates, number, step)
        loss = mean_loss(updates)
        last = is_last_round(ctx, [*losses(out), loss])
        if is_evaluated(ctx, number) and ctx.strategy.syncs_statistics:
            out.server.serving = with_synced_statistics(ctx, out.server.state, list(_sync_statistics(ctx, out)))
        scores = _evaluate(ctx, out, last=last) if is_evaluated(ctx, number) else {}
        if last:
            out.scores = scores
        own, unseen = (mean_metric(ctx, scores, unseen=is_unseen) for is_unseen in (False, True))
        out.curve.append(RoundMetrics(number, loss, own, unseen, diverged_client(ctx, updates)))
        out.seconds = previous_seconds + time.perf_counter() - start
        out.cpu_seconds = previous_cpu + time.process_time() - cpu_start
        if on_round:
            on_round(number, out)
    out.sums |= collect_sums(ctx, [text for text in sums if text not in out.sums], partial(_send_sums, ctx, out))
    return out


def _send_sums(ctx: RunContext, out: Outcome, method: SumsMethod, number: int, received: State) -> list[State]:
    messages = []
    for user in ctx.population.seen:
        with reported(f"labeled sums, {client_name(user)}"):
            model = ctx.load(ctx.assemble(out.server.serving, None))
            messages.append(client_sums(ctx, user, model, method, number, received))
    out.traffic.count_sums(received, messages)
    return messages


def _sync_statistics(ctx: RunContext, out: Outcome) -> Iterator[dict[str, Moments]]:
    def exchange(aggregates: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        messages = []
        for user in ctx.trainers:
            with reported(f"statistics sync, {client_name(user)}"):
                own = out.client_states.get(user)
                messages.append(client_sync_statistics(ctx, user, out.server.state, own, aggregates))
        return messages

    return run_consensus(exchange, traffic_counter(ctx, out, "statistics sync"))


def _sync_first_batch(
    ctx: RunContext, out: Outcome, sampled: list[int], progress: Progress
) -> Iterator[dict[str, Moments]]:
    received = {u: out.server.state_for(ctx, u) for u in sampled}

    def exchange(aggregates: list[dict[str, Moments]]) -> list[dict[str, Moments] | None]:
        messages = []
        for user in sampled:
            with reported(f"first-batch sync, {client_name(user)}, round {progress.round}"):
                own = out.client_states.get(user)
                messages.append(client_sync_first_batch(ctx, user, received[user], own, progress, aggregates))
        return messages

    return run_consensus(exchange, traffic_counter(ctx, out, "first-batch sync"))


def _evaluate(ctx: RunContext, out: Outcome, *, last: bool) -> dict[int, list[Score]]:
    summary = summarize(ctx, out.server.client_statistics) if last else None
    scores = {}
    for user in served_users(ctx):
        received = out.server.state_for(ctx, user, serving=True)
        with reported(f"evaluate, {client_name(user)}"):
            scores[user] = client_evaluation(
                ctx,
                user,
                received,
                out.client_states.get(user),
                columns=COLUMNS if last else COLUMNS[:1],
                globally=global_columns(ctx, user) if last else (),
                client_statistics=statistics_for(ctx, user, summary),
                final=last,
            )
    return scores
