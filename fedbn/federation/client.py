"""One client's part of a round: training, synchronization of statistics, evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fedbn.augment.base import augmentation
from fedbn.federation.cold_start import ClientStatistics, cold_starts, population_prior_for
from fedbn.federation.context import RunContext
from fedbn.federation.evaluation import evaluate_user
from fedbn.federation.metrics import Column, Score, score
from fedbn.federation.training import augmentation_draws, epoch_batches, fit
from fedbn.nn.inference import logits
from fedbn.nn.roles import State, clone, with_prefix
from fedbn.online.rules.base import client_rule
from fedbn.personalization.base import ClientTrainer
from fedbn.seeds import seeded
from fedbn.statistics.consensus import Aggregates, replay
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress, Update

OPTIMIZER = "optimizer/"
"""Prefix of the optimizer's state in the client state; these entries are never sent."""

METHOD_STATE = "method_state/"
"""Prefix of the personalization method's entries in the client state; these entries are never sent."""


def _split(client_state: State | None, ctx: RunContext) -> tuple[State, State, State]:
    """Split a client state into (model entries, state of the optimizer, state of the personalization method)."""
    client_state = client_state or {}
    entries = {k: v for k, v in client_state.items() if k in ctx.ownership.roles}
    return entries, with_prefix(client_state, OPTIMIZER), with_prefix(client_state, METHOD_STATE)


def _client_trainer(
    ctx: RunContext, user: int, model: nn.Module, progress: Progress, aggregates: Aggregates, optimizer: State
) -> ClientTrainer:
    plan, data = ctx.run.plan, ctx.training_data(user)
    shared = set(ctx.ownership.travels if plan.proximal else ())
    received = {n: p.detach().clone() for n, p in model.named_parameters() if n in shared}

    def set_training_mode() -> None:
        ctx.strategy.set_training_mode(model, progress, aggregates)

    def run_fit(model: nn.Module, **options: Any) -> float:
        main = not options.get("purpose")
        method_hook = options.pop("on_before_optimizer_step", None)

        def on_before_optimizer_step(trained: nn.Module) -> None:
            if method_hook is not None:
                method_hook(trained)
            ctx.strategy.on_before_optimizer_step(trained)

        loss, new = fit(
            model,
            data,
            plan,
            task=ctx.task,
            seed=ctx.run.seed,
            round=progress.round,
            user=ctx.rng_user(user),
            pull=options.pop("pull", None) or (plan.proximal, received),
            on_before_optimizer_step=on_before_optimizer_step,
            optimizer_state=optimizer if main else None,
            row_users=ctx.row_users(user),
            **options,
        )
        if main:
            optimizer.update(new)
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
    """One client's round: assemble its model, train it, and split the result into update and client state.

    Args:
        ctx: the run's context.
        user: index of the client.
        received: the server's entries.
        client_state: the client's state after the last round in which it took part.
        progress: the current round.
        aggregates: results of this round's first-batch synchronization.
        broadcast: tensors that the server sends to all clients besides the model.

    Returns:
        The update for the server, and the new client state.
    """
    own, optimizer, method_state = _split(client_state, ctx)
    model = ctx.load(ctx.assemble(received, own))
    data = ctx.training_data(user)
    notes = ctx.strategy.before_local_training(model, data, progress)
    ctx.strategy.set_training_mode(model, progress, aggregates)
    trainer = _client_trainer(ctx, user, model, progress, aggregates, optimizer)
    trainer.broadcast, trainer.method_state = broadcast or {}, method_state
    loss = ctx.personal.train(trainer)
    notes |= ctx.strategy.after_local_training(model) | trainer.notes
    state = clone(model.state_dict())
    shared, retained = ({k: state[k] for k in keys} for keys in (ctx.ownership.travels, ctx.ownership.retained))
    retained |= {OPTIMIZER + k: v for k, v in optimizer.items()}
    retained |= {METHOD_STATE + k: v for k, v in trainer.method_state.items()}
    return Update(user, shared, len(data), loss, notes), retained


def client_sync_first_batch(
    ctx: RunContext, user: int, received: State, client_state: State | None, progress: Progress, aggregates: Aggregates
) -> dict[str, Moments] | None:
    """One client's next message about its first batch of a round; None when there is no further message."""
    own, _, _ = _split(client_state, ctx)
    data = ctx.training_data(user)
    rng_user, row_users = ctx.rng_user(user), ctx.row_users(user)
    first = next(epoch_batches(len(data), ctx.run.plan, ctx.run.seed, progress.round, rng_user, 0, row_users=row_users))
    model, batch = ctx.load(ctx.assemble(received, own)), data.take(first.to(data.y.device))
    if (augment := augmentation(ctx.run.plan.augment)) is not None:
        x, y = augment(batch.x, batch.y, next(augmentation_draws(ctx.run.seed, progress.round, rng_user)))
        batch = replace(batch, x=x, y=y)
    with seeded(ctx.run.seed, "noise", progress.round, rng_user):  # same dropout as in the first step
        return ctx.strategy.sync_first_batch(model, batch, aggregates)


def user_state(ctx: RunContext, user: int, received: State, client_state: State | None) -> State:
    """State of a user's model after aggregation, personalized if the run has a personalization method.

    Args:
        ctx: the run's context.
        user: index of the user.
        received: the server's entries.
        client_state: the user's client state.
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
    client_statistics: ClientStatistics | None = None,
    final: bool = True,
) -> list[Score]:
    """Score one user's cells of the evaluation matrix, with its model after aggregation.

    Args:
        ctx: the run's context.
        user: index of the user.
        received: the server's entries.
        client_state: the user's client state.
        columns: columns to score.
        globally: columns that are also scored on the pooled test rows.
        client_statistics: statistics of the clients, for rules with a population prior; an unseen user is also scored
            with every cold start that they allow.
        final: whether to compute all metrics, as in the evaluation after the last round; otherwise, only those of
            learning curves.
    """
    state = user_state(ctx, user, received, client_state)
    out = user_scores(ctx, user, state, columns, globally, client_statistics, final=final)
    return out + cold_start_scores(ctx, user, state, client_statistics) if client_statistics else out


def user_scores(
    ctx: RunContext,
    user: int,
    state: State,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...],
    client_statistics: ClientStatistics | None,
    *,
    final: bool,
) -> list[Score]:
    """Score some columns for a user whose complete state is given (`user_state`); see `client_evaluation`."""
    data = ctx.population.users[user]
    return evaluate_user(
        ctx.scratch,
        state,
        task=ctx.task,
        calibration=data.train.x,
        test=data.test,
        unseen=user in ctx.population.unseen,
        pooled_test=ctx.pooled_test if globally else None,
        columns=columns,
        globally=globally,
        final=final,
        online_prior=ctx.run.plan.online_prior,
        online_rule=client_rule(ctx.run.rule) if ctx.run.rule else None,
        prior=population_prior_for(ctx, state, client_statistics, data.train.x)
        if client_statistics and ctx.uses_population_prior
        else None,
        predict_stream=ctx.strategy.predict_stream,
    )


def cold_start_scores(ctx: RunContext, user: int, state: State, client_statistics: ClientStatistics) -> list[Score]:
    """Score an unseen user with every cold start that the clients' statistics allow; nothing for a seen user."""
    if user not in ctx.population.unseen:
        return []
    data = ctx.population.users[user]
    return [
        score(ctx.task, "unseen", name, logits(ctx.load(start), data.test.x), data.test.y)
        for name, start in cold_starts(ctx, state, client_statistics, data.train.x).items()
    ]


def client_sync_statistics(
    ctx: RunContext, user: int, received: State, client_state: State | None, aggregates: Aggregates
) -> dict[str, Moments] | None:
    """One client's next message in synchronizing statistics; None when there is no further message."""
    own, _, _ = _split(client_state, ctx)
    state, x = ctx.assemble(received, own), ctx.training_data(user).x
    return replay(lambda: ctx.strategy.sync_statistics(ctx.load(state), x), aggregates)
