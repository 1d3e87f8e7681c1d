"""One client's part of a round: training, synchronization of statistics, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedbn.federation.cold_start import population, starts
from fedbn.federation.context import EVERYONE, Setting
from fedbn.federation.evaluation import evaluate_user
from fedbn.federation.metrics import Column, Score, score
from fedbn.federation.training import epoch_batches, fit
from fedbn.nn.inference import logits
from fedbn.nn.roles import State, clone
from fedbn.online.rules.base import client_rule
from fedbn.personalization.base import Work
from fedbn.seeds import key
from fedbn.statistics.consensus import Heard, replay
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress, Update

OPTIMIZER = "optimizer/"
"""Prefix of a client's momentum buffers among the entries it keeps; such entries never travel."""


ASIDE = "aside/"
"""Prefix of what a personalization method keeps at the client; such entries never travel."""


def _split(kept: State | None, here: Setting) -> tuple[State, State, State]:
    """What a client keeps, as (model entries, momentum buffers, a personalization method's own)."""
    kept = kept or {}
    momentum = {k.removeprefix(OPTIMIZER): v for k, v in kept.items() if k.startswith(OPTIMIZER)}
    aside = {k.removeprefix(ASIDE): v for k, v in kept.items() if k.startswith(ASIDE)}
    return {k: v for k, v in kept.items() if k in here.ownership.roles}, momentum, aside


def _work(here: Setting, user: int, model: nn.Module, progress: Progress, heard: Heard, momentum: State) -> Work:
    plan, data = here.run.plan, here.training_data(user)
    # One place that holds one user's data draws as that user would: then it is the same training.
    drawn = here.population.seen[0] if user == EVERYONE else user
    shared = set(here.ownership.travels)
    received = {n: p.detach().clone() for n, p in model.named_parameters() if n in shared} if plan.proximal else {}

    def begin() -> None:
        here.strategy.begin(model, progress, heard)

    def run_fit(model: nn.Module, **options: Any) -> float:
        main = not options.get("purpose")
        own_hook = options.pop("before_step", None)

        def before_step(trained: nn.Module) -> None:
            if own_hook is not None:
                own_hook(trained)
            here.strategy.before_step(trained)

        loss, buffers = fit(
            model,
            data,
            plan,
            seed=here.run.seed,
            round=progress.round,
            user=drawn,
            pull=options.pop("pull", None) or (plan.proximal, received),
            before_step=before_step,
            optimizer_state=momentum if main else None,
            owners=here.owners_of_rows(user),
            **options,
        )
        if main:
            momentum.update(buffers)
        return loss

    return Work(model, data, plan, progress, here.ownership.roles, run_fit, begin)


def client_round(
    here: Setting,
    user: int,
    received: State,
    kept: State | None,
    progress: Progress,
    heard: Heard = (),
    told: State | None = None,
) -> tuple[Update, State]:
    """One client's round: assemble its model, train it, part what travels from what stays.

    Args:
        here: the run's setting.
        user: index of the client.
        received: the server's entries.
        kept: the client's own, from the last round in which it took part.
        progress: which round.
        heard: the answers of this round's consultation.
        told: what the server tells all clients besides the model.

    Returns:
        The update for the server, and all entries the client keeps for itself.
    """
    own, momentum, aside = _split(kept, here)
    model = here.load(here.assemble(received, own))
    data = here.training_data(user)
    notes = here.strategy.measure(model, data, progress)
    here.strategy.begin(model, progress, heard)
    work = _work(here, user, model, progress, heard, momentum)
    work.heard, work.aside = told or {}, aside
    loss = here.personal.train(work)
    notes |= here.strategy.report(model) | work.notes
    state = clone(model.state_dict())
    travels = {k: state[k] for k in here.ownership.travels}
    stays = {k: state[k] for k in here.ownership.kept}
    stays |= {OPTIMIZER + k: v for k, v in momentum.items()}
    stays |= {ASIDE + k: v for k, v in work.aside.items()}
    return Update(user, travels, len(data), loss, notes), stays


def client_consult(
    here: Setting, user: int, received: State, kept: State | None, progress: Progress, heard: Heard
) -> dict[str, Moments] | None:
    """What one client says next about the first batch of the round that is about to begin; None at the end."""
    own, _, _ = _split(kept, here)
    data = here.training_data(user)
    drawn = here.population.seen[0] if user == EVERYONE else user
    owners = here.owners_of_rows(user)
    first = next(epoch_batches(len(data), here.run.plan, here.run.seed, progress.round, drawn, 0, owners=owners))
    model, batch = here.load(here.assemble(received, own)), data.take(first.to(data.y.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(here.run.seed, "noise", progress.round, drawn))  # dropout as in the step to come
        return here.strategy.consult(model, batch, heard)


def user_state(here: Setting, user: int, received: State, kept: State | None) -> State:
    """A user's whole model after aggregation: assembled, and personalized where the run says so.

    Args:
        here: the run's setting.
        user: index of the user.
        received: the server's entries.
        kept: the user's own.
    """
    own, _, aside = _split(kept, here)
    state = here.assemble(received, own)
    if here.treatment.personalizes and user in here.population.seen:
        finished = Progress(here.run.plan.rounds, here.run.plan.rounds)
        model = here.load(state)
        here.strategy.begin(model, finished)
        work = _work(here, user, model, finished, (), {})
        work.aside = aside
        state = here.personal.serve(work)
    return state


def client_evaluation(
    here: Setting,
    user: int,
    received: State,
    kept: State | None,
    *,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...] = (),
    registry: dict[int, State] | None = None,
) -> list[Score]:
    """One user's cells of the evaluation matrix, with its model as assembled after aggregation.

    Args:
        here: the run's setting.
        user: index of the user.
        received: the server's entries.
        kept: the user's own.
        columns: columns to score.
        globally: columns that are also scored on the pooled test rows.
        registry: statistics by client, for rules that start from the population; an unseen user is also scored from
            every start they allow.
    """
    state = user_state(here, user, received, kept)
    return [
        *cells(here, user, state, columns, globally, registry),
        *(newcomer_cells(here, user, state, registry) if registry else ()),
    ]


def cells(
    here: Setting,
    user: int,
    state: State,
    columns: tuple[Column, ...],
    globally: tuple[Column, ...],
    registry: dict[int, State] | None,
) -> list[Score]:
    """A user's cells of some columns, given its whole model (`user_state`); else as `client_evaluation`."""
    person = here.population.users[user]
    return evaluate_user(
        here.scratch,
        state,
        calibration=person.train.x,
        test=person.test,
        unseen=user in here.population.unseen,
        everyone=here.everyone if globally else None,
        columns=columns,
        globally=globally,
        online_prior=here.run.plan.online_prior,
        online_rule=client_rule(here.run.rule) if here.run.rule else None,
        prior=population(here, state, registry, person.train.x) if registry and here.asks_population else None,
        follow=here.strategy.follow,
    )


def newcomer_cells(here: Setting, user: int, state: State, registry: dict[int, State]) -> list[Score]:
    """The cells of an unseen user for every start that other clients' statistics allow; none of a seen one's."""
    if user not in here.population.unseen:
        return []
    person = here.population.users[user]
    return [
        score("unseen", name, logits(here.load(start), person.test.x), person.test.y)
        for name, start in starts(here, state, registry, person.train.x).items()
    ]


def client_talk(
    here: Setting, user: int, received: State, kept: State | None, answers: Sequence[dict[str, Moments]]
) -> dict[str, Moments] | None:
    """What one client says next in settling statistics, after the answers heard so far; None at the end."""
    own, _, _ = _split(kept, here)
    state = here.assemble(received, own)
    x = here.training_data(user).x
    return replay(lambda: here.strategy.settle(here.load(state), x), answers)
