"""A round of federation, as plain functions, and the readable one-process loop made of them.

`client_round`, `client_evaluation` and `client_talk` are what a client does; `Server.advance` and `settled` what
the server does. Flower's apps call the very same functions, so `federate` is the oracle of every engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fedbn.federation.client import client_consult, client_evaluation, client_round, client_talk
from fedbn.federation.context import Setting
from fedbn.federation.metrics import COLUMNS, Score
from fedbn.federation.protection import protected
from fedbn.federation.run import Run
from fedbn.federation.server import (
    Outcome,
    Point,
    Server,
    ServerStep,
    counting,
    evaluated,
    global_columns,
    mean_accuracy,
    mean_loss,
    served,
    settled,
)
from fedbn.federation.setup import setting
from fedbn.statistics.consensus import hold
from fedbn.statistics.moments import Moments
from fedbn.strategies.base import Progress


def federate(
    run: Run,
    *,
    here: Setting | None = None,
    step: ServerStep | None = None,
    resume: Outcome | None = None,
    on_round: Callable[[int, Outcome], None] | None = None,
) -> Outcome:
    """Run a whole federation in one process: the readable version, and the oracle of every engine.

    Args:
        run: what to do.
        here: the run made concrete; None: what `setting` makes of it.
        step: the server's step on parameters (None: take the mean).
        resume: an unfinished outcome to go on from.
        on_round: told after each round.

    >>> from fedbn.config import Plan
    >>> run = Run("digits8", "fedbn", plan=Plan(rounds=1, eval_every=1))
    >>> len(federate(run).curve)
    1
    """
    here = here or setting(run)
    began = time.perf_counter()
    out = resume or Outcome(Server(here.start(), here.start()))
    spent = out.seconds
    for number in range(len(out.curve) + 1, run.plan.rounds + 1):
        progress = Progress(number, run.plan.rounds)
        sampled = here.sampled(number)
        heard = list(_consult(here, out, sampled, progress)) if here.strategy.consults else []
        updates = []
        for user in sampled:
            received = out.server.sends(here, user)
            mine = replace(progress, met=here.strategy.met(user, out.server.known))
            update, out.kept[user] = client_round(
                here, user, received, out.kept.get(user), mine, heard, out.server.told
            )
            updates.append(protected(here, update, received, mine))
        out.trained |= dict.fromkeys(sampled, number)
        out.traffic.round(updates, out.server.told, heard)
        out.server.advance(here, updates, number, step)
        if evaluated(here, number) and here.strategy.settles:
            out.server.serving = settled(here, out.server.state, list(_talk(here, out)))
        scores = _evaluate(here, out, last=number == run.plan.rounds) if evaluated(here, number) else {}
        if number == run.plan.rounds:
            out.scores = scores
        out.curve.append(
            Point(
                number,
                mean_loss(updates),
                mean_accuracy(here, scores, unseen=False),
                mean_accuracy(here, scores, unseen=True),
            )
        )
        out.seconds = spent + time.perf_counter() - began
        if on_round:
            on_round(number, out)
    return out


def _talk(here: Setting, out: Outcome) -> Iterator[dict[str, Moments]]:
    return hold(
        lambda answers: [client_talk(here, u, out.server.state, out.kept.get(u), answers) for u in here.trainers],
        counting(here, out, "settling"),
    )


def _consult(here: Setting, out: Outcome, sampled: list[int], progress: Progress) -> Iterator[dict[str, Moments]]:
    return hold(
        lambda answers: [
            client_consult(here, u, out.server.sends(here, u), out.kept.get(u), progress, answers) for u in sampled
        ],
        counting(here, out, "consulting"),
    )


def _evaluate(here: Setting, out: Outcome, *, last: bool) -> dict[int, list[Score]]:
    return {
        user: client_evaluation(
            here,
            user,
            out.server.sends(here, user, serving=True),
            out.kept.get(user),
            columns=COLUMNS if last else COLUMNS[:1],
            globally=global_columns(here, user) if last else (),
            registry=out.server.registry if last and here.hears_registry(user) else None,
        )
        for user in served(here)
    }
