"""The mismatch between training and serving in a finished run.

It compares the task's metric on some of the clients' training windows under the statistics of their batches and under
those with which the model is served. It is measured where the clients' data are, so it is not measured in deployments.
"""

from __future__ import annotations

from typing import Any

import torch

from fedbn.federation.context import RunContext
from fedbn.federation.server import Outcome
from fedbn.nn.roles import statistics_layers
from fedbn.seeds import generator
from fedbn.statistics.mismatch import LARGE_GAP, REMEDY, outputs_in_both_modes
from fedbn.strategies.base import Progress

MAX_CLIENTS = 16
MAX_WINDOWS = 64
"""Largest numbers of measured clients, and of windows of each."""


def measure_mismatch(ctx: RunContext, outcome: Outcome) -> dict[str, Any] | None:
    """Mean over clients of the task's main metric in both modes.

    Args:
        ctx: the run's context.
        outcome: the finished run.

    Returns:
        ``metric``, ``batch``, ``served``, ``clients`` and ``windows``; None if the model has no statistics, batches are
        synchronized between clients, or the clients' data or states are not in this process.
    """
    strategy, population = ctx.strategy, ctx.population
    lost = bool(ctx.ownership.retained) and not outcome.client_states
    if population.remote or lost or strategy.syncs_first_batch or not statistics_layers(ctx.scratch):
        return None
    finished = Progress(ctx.run.plan.rounds, ctx.run.plan.rounds)
    step = -(-len(population.seen) // MAX_CLIENTS)
    metric, values, windows = ctx.task.main_metric, [], 0
    for user in population.seen[::step]:
        data = population.users[user].train
        rows = torch.randperm(len(data), generator=generator(ctx.run.seed, "mismatch", user))[:MAX_WINDOWS]
        sample = data.take(rows.to(data.y.device))
        if len(sample) < 2:
            continue
        received = outcome.server.state_for(ctx, user, serving=True)
        model = ctx.load(ctx.assemble(received, outcome.client_states.get(user)))
        outputs = outputs_in_both_modes(
            model, sample.x, ctx.run.plan.batch_size, lambda m: strategy.set_training_mode(m, finished)
        )
        pair = [ctx.task.evaluate(out, sample.y, final=False).get(metric) for out in outputs]
        if None not in pair:
            values.append(pair)
            windows += len(sample)
    if not values:
        return None
    batch, served = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
    return {"metric": metric, "batch": batch, "served": served, "clients": len(values), "windows": windows}


def mismatch_notices(ctx: RunContext, found: dict[str, Any] | None) -> list[str]:
    """A warning if the served statistics cost more than `LARGE_GAP` of a share such as accuracy."""
    if found is None or found["metric"] not in ctx.task.metrics or not ctx.task.metrics_are_shares:
        return []
    gap = (found["batch"] - found["served"]) * (1 if ctx.task.directions[found["metric"]] else -1)
    if gap <= LARGE_GAP:
        return []
    # Without the size of the difference, so that seeds share a notice.
    metric = str(found["metric"]).replace("_", " ")
    return [
        f"{metric} on the clients' own training data is more than {LARGE_GAP:g} worse with the running statistics, "
        f"which serve predictions, than with batch statistics: {REMEDY}"
    ]
