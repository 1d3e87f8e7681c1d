"""When training stops: after the last round, or earlier where the training loss has converged.

The criterion is the training loss, so nothing is selected on test data. It depends on the learning curve only, so a
resumed run stops in the same round, and so does every engine with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from fedbn.config import Plan
from fedbn.federation.context import RunContext
from fedbn.federation.server import Outcome
from fedbn.optim.schedules import schedule

Convergence = Literal["converged", "not converged", "diverged", "all rounds"]


def has_converged(plan: Plan, losses: Sequence[float]) -> bool:
    """Whether the training loss has not improved by more than ``min_delta`` in ``patience`` evaluations.

    The loss of an evaluation is the mean over the rounds since the one before, as single rounds depend on the sampled
    clients. Losses that are not finite are no improvement.

    Args:
        plan: settings; without ``patience``, training does not converge.
        losses: training loss of each round from the first.

    >>> plan = Plan(eval_every=2, patience=2, min_delta=0.1)
    >>> [has_converged(plan, [1.0, 0.6, 0.6, 0.9, 0.9, 0.7][:rounds]) for rounds in (4, 5, 6)]
    [False, False, True]
    """
    every = plan.eval_every
    if plan.patience is None or len(losses) % every:
        return False
    best, stale = math.inf, 0
    for start in range(0, len(losses), every):
        loss = sum(losses[start : start + every]) / every
        improved = loss < best - plan.min_delta
        best, stale = (loss, 0) if improved else (best, stale + 1)
    return stale >= plan.patience


def depends_on_rounds(ctx: RunContext) -> bool:
    """Whether training depends on the total number of rounds, and so needs all of them."""
    parts = (schedule(ctx.run.plan.schedule), ctx.strategy, ctx.personal)
    return any(part.depends_on_rounds for part in parts)


def is_last_round(ctx: RunContext, losses: Sequence[float]) -> bool:
    """Whether training ends with a round.

    Args:
        ctx: the run's context.
        losses: training loss of each round, up to this one.
    """
    plan = ctx.run.plan
    return len(losses) >= plan.rounds or (not depends_on_rounds(ctx) and has_converged(plan, losses))


def remaining_rounds(ctx: RunContext, out: Outcome) -> Iterator[int]:
    """Numbers of the rounds that an outcome lacks; each round has to add its metrics to the curve."""
    while not is_last_round(ctx, losses(out)):
        yield len(out.curve) + 1


def losses(out: Outcome) -> list[float]:
    """Training loss of each round."""
    return [point.train_loss for point in out.curve]


def convergence(ctx: RunContext, out: Outcome) -> Convergence | None:
    """How the training of a finished run ended; None for a run without ``patience``.

    ``all rounds`` means that the rule is not used, as training depends on the number of rounds.
    """
    if ctx.run.plan.patience is None:
        return None
    if not math.isfinite(out.curve[-1].train_loss):
        return "diverged"
    if depends_on_rounds(ctx):
        return "all rounds"
    return "converged" if has_converged(ctx.run.plan, losses(out)) else "not converged"


def convergence_notices(ctx: RunContext, out: Outcome) -> list[str]:
    """Notices about training that did not end by the rule of ``patience``."""
    plan = ctx.run.plan
    match convergence(ctx, out):
        case "not converged":
            text = f"training did not converge within {plan.rounds} rounds: use more --rounds or a larger --min-delta"
        case "all rounds":
            text = f"training has all {plan.rounds} rounds, because it depends on their number; --patience is not used"
        case _:
            return []
    return [text]
