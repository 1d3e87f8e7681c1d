"""Measure differences between users in labels, quantity, inputs and layer statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedbn.data.skew import measure, statistics_distance
from fedbn.federation.setup import build_context
from fedbn.nn.roles import Role, statistics_layers
from fedbn.statistics.recalibration import all_moments
from fedbn_simulations.experiments.experiment import Experiment
from fedbn_simulations.experiments.tasks import CHECKPOINT, Task
from fedbn_simulations.storage.checkpoint import load_outcome


def measure_shift(experiment: Experiment, tasks: Sequence[Task]) -> dict[str, Any]:
    """Measure differences between seen users in labels, quantity, inputs and the statistics of each BN layer.

    The statistics are those of all users' training data in one network: the final network with the first seed of
    the first strategy that has normalization statistics and a shared body.
    """
    first = build_context(experiment.run(experiment.strategies[0], experiment.seed_numbers[0]))
    skew = measure(first.population).as_dict()
    for task in tasks:
        ctx = build_context(task.run)
        if not statistics_layers(ctx.scratch) or not ctx.ownership.shares(Role.BODY):
            continue
        outcome = load_outcome(Path(task.directory) / CHECKPOINT, task.run)
        seen = ctx.population.seen
        ctx.load(ctx.assemble(outcome.server.serving, None))
        moments = [all_moments(ctx.scratch, ctx.population.users[i].train.x) for i in seen]
        names = [ctx.population.users[i].name for i in seen]
        return skew | {
            "layers": [
                {
                    "layer": layer,
                    "users": names,
                    "distance": statistics_distance(
                        [m[layer].mean.numpy() for m in moments], [m[layer].variance().numpy() for m in moments]
                    ).tolist(),
                }
                for layer in moments[0]
            ]
        }
    return skew | {"layers": []}
