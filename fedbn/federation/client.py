"""One client's part of a round: training, synchronization of statistics, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedbn.federation.cold_start import population, starts
from fedbn.federation.context import EVERYONE, RunContext
from fedbn.federation.evaluation import evaluate_user
from fedbn.federation.metrics import Column, Score, score
from fedbn.federation.training import epoch_batches, fit
from fedbn.nn.inference import logits
from fedbn.nn.roles import State, clone
from fedbn.online.rules.base import client_rule
from fedbn.personalization.base import ClientTrainer
from fedbn.seeds import key
from fedbn.statistics.consensus import Aggregates, replay
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress, Update

OPTIMIZER = "optimizer/"
"""Prefix of a client's momentum buffers among the entries it keeps; such entries never travel."""


METHOD_STATE = "method_state/"
"""Prefix of what a personalization method keeps at the client; such entries never travel."""


def _split(client_state: State | None, ctx: RunContext) -> tuple[State, State, State]:
    """What a client keeps, as (model entries, momentum buffers, a personalization method's own)."""
    client_state = client_state or {}
    momentum = {k.removeprefix(OPTIMIZER): v for k, v in client_state.items() if k.startswith(OPTIMIZER)}
    method_state = {k.removeprefix(METHOD_STATE): v for k, v in client_state.items() if k.startswith(METHOD_STATE)}
    return {k: v for k, v in client_state.items() if k in ctx.ownership.roles}, momentum, method_state


def _client_trainer(
    ctx: RunContext, user: int, model: nn.Module, progress: Progress, aggregates: Aggregates, momentum: State
) -> ClientTrainer:
    plan, data = ctx.run.plan, ctx.training_data(user)
    # One place that holds one user's data draws as that user would: then it is the same training.
    drawn = ctx.population.seen[0] if user == EVERYONE else user
    shared = set(ctx.ownership.travels)
    received = {n: p.detach().clone() for n, p in model.named_parameters() if n in shared} if plan.proximal else {}

    def set_training_mode() -> None:
        ctx.strategy.set_training_mode(model, progress, aggregates)

    def run_fit(model: nn.Module, **options: Any) -> float:
        main = not options.get("purpose")
        own_hook = options.pop("on_before_optimizer_step", None)

        def on_before_optimizer_step(trained: nn.Module) -> None:
            if own_hook is not None:
                own_hook(trained)
            ctx.strategy.on_before_optimizer_step(trained)

        loss, buffers = fit(
            model,
            data,
            plan,
            seed=ctx.run.seed,
            round=progress.round,
            user=drawn,
            pull=options.pop("pull", None) or (plan.proximal, received),
            on_before_optimizer_step=on_before_optimizer_step,
            optimizer_state=momentum if main else None,
            owners=ctx.owners_of_rows(user),
            **options,
        )
        if main:
            momentum.update(buffers)
        return loss

    return ClientTrainer(model, data, plan, progress, ctx.ownership.roles, run_fit, set_training_mode)


def client_round(
    ctx: RunContext,
    user: int,
    received: State,
    client_state: State | None,
    progress: Progress,
    aggregates: Aggregates = (),
    broadcast: State | None = None,
) -> tuple[Update, State]:
    """One client's round: assemble its model, train it, part what travels from what stays.

    Args:
        ctx: the run's context.
        user: index of the client.
        received: the server's entries.
        client_state: the client's own, from the last round in which it took part.
        progress: which round.
        aggregates: the answers of this round's consultation.
        broadcast: what the server tells all clients besides the model.

    Returns:
        The update for the server, and all entries the client keeps for itself.
    """
    own, momentum, method_state = _split(client_state, ctx)
    model = ctx.load(ctx.assemble(received, own))
    data = ctx.training_data(user)
    notes = ctx.strategy.before_local_training(model, data, progress)
    ctx.strategy.set_training_mode(model, progress, aggregates)
    trainer = _client_trainer(ctx, user, model, progress, aggregates, momentum)
    trainer.broadcast, trainer.method_state = broadcast or {}, method_state
    loss = ctx.personal.train(trainer)
    notes |= ctx.strategy.after_local_training(model) | trainer.notes
    state = clone(model.state_dict())
    travels = {k: state[k] for k in ctx.ownership.travels}
    stays = {k: state[k] for k in ctx.ownership.retained}
    stays |= {OPTIMIZER + k: v for k, v in momentum.items()}
    stays |= {METHOD_STATE + k: v for k, v in trainer.method_state.items()}
    return Update(user, travels, len(data), loss, notes), stays


def client_sync_first_batch(
    ctx: RunContext, user: int, received: State, client_state: State | None, progress: Progress, aggregates: Aggregates
) -> dict[str, Moments] | None:
    """What one client says next about the first batch of the round that is about to begin; None at the end."""
    own, _, _ = _split(client_state, ctx)
    data = ctx.training_data(user)
    drawn = ctx.population.seen[0] if user == EVERYONE else user
    owners = ctx.owners_of_rows(user)
    first = next(epoch_batches(len(data), ctx.run.plan, ctx.run.seed, progress.round, drawn, 0, owners=owners))
    model, batch = ctx.load(ctx.assemble(received, own)), data.take(first.to(data.y.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(ctx.run.seed, "noise", progress.round, drawn))  # dropout as in the step to come
        return ctx.strategy.sync_first_batch(model, batch, aggregates)


def user_state(ctx: RunContext, user: int, received: State, client_state: State | None) -> State:
    """A user's whole model after aggregation: assembled, and personalized where the run says so.

    Args:
        ctx: the run's context.
        user: index of the user.
        received: the server's entries.
        client_state: the user's own.
    """
    own, _, method_state = _split(client_state, ctx)
    state = ctx.assemble(received, own)
    if ctx.treatment.personalizes and user in ctx.population.seen:
        finished = Progress(ctx.run.plan.rounds, ctx.run.plan.rounds)
        model = ctx.load(state)
        ctx.strategy.set_training_mode(model, finished)
        trainer = _client_trainer(ctx, user, model, finished, (), {})
        trainer.method_state = method_state
        state = ctx.personal.personalized_state(trainer)
    return state


def client_evaluation(
    ctx: RunContext,
    user: int,
    received: State,
    client_state: State | None,
    *,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...] = (),
    client_statistics: dict[int, State] | None = None,
) -> list[Score]:
    """One user's cells of the evaluation matrix, with its model as assembled after aggregation.

    Args:
        ctx: the run's context.
        user: index of the user.
        received: the server's entries.
        client_state: the user's own.
        columns: columns to score.
        globally: columns that are also scored on the pooled test rows.
        client_statistics: statistics by client, for rules that start from the population; an unseen user is also scored
            from every start they allow.
    """
    state = user_state(ctx, user, received, client_state)
    return [
        *cells(ctx, user, state, columns, globally, client_statistics),
        *(newcomer_cells(ctx, user, state, client_statistics) if client_statistics else ()),
    ]


def cells(
    ctx: RunContext,
    user: int,
    state: State,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...],
    client_statistics: dict[int, State] | None,
) -> list[Score]:
    """A user's cells of some columns, given its whole model (`user_state`); else as `client_evaluation`."""
    person = ctx.population.users[user]
    return evaluate_user(
        ctx.scratch,
        state,
        calibration=person.train.x,
        test=person.test,
        unseen=user in ctx.population.unseen,
        everyone=ctx.everyone if globally else None,
        columns=columns,
        globally=globally,
        online_prior=ctx.run.plan.online_prior,
        online_rule=client_rule(ctx.run.rule) if ctx.run.rule else None,
        prior=population(ctx, state, client_statistics, person.train.x)
        if client_statistics and ctx.asks_population
        else None,
        follow=ctx.strategy.predict_stream,
    )


def newcomer_cells(ctx: RunContext, user: int, state: State, client_statistics: dict[int, State]) -> list[Score]:
    """The cells of an unseen user for every start that other clients' statistics allow; none of a seen one's."""
    if user not in ctx.population.unseen:
        return []
    person = ctx.population.users[user]
    return [
        score("unseen", name, logits(ctx.load(start), person.test.x), person.test.y)
        for name, start in starts(ctx, state, client_statistics, person.train.x).items()
    ]


def client_consensus(
    ctx: RunContext, user: int, received: State, client_state: State | None, answers: Sequence[dict[str, Moments]]
) -> dict[str, Moments] | None:
    """What one client says next in settling statistics, after the answers heard so far; None at the end."""
    own, _, _ = _split(client_state, ctx)
    state = ctx.assemble(received, own)
    x = ctx.training_data(user).x
    return replay(lambda: ctx.strategy.sync_statistics(ctx.load(state), x), answers)
