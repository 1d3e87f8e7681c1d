"""Alignment of a turned device, and the federation's own check of it

Real people, with a phone at the waist or a watch at the wrist, some of them unseen. A federation trains a network. Its
seen clients send labeled sums, from which unseen people's devices are turned back without labels, and their population
prior (`fedbn.online.alignments.rotation`, `fedbn.online.rules.population`). Streams are in recorded order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedbn.data.population import Population, User
from fedbn.federation.run import Run, plan_for
from fedbn.federation.setup import build_context
from fedbn.nn.plain import copy_model
from fedbn.online.prequential_metrics import scores
from fedbn.online.traces import Trace
from fedbn_simulations.adaptation.cells import SOURCE, Cell, run_cell
from fedbn_simulations.adaptation.check import AUTO, RECORDED, WORN, decide
from fedbn_simulations.adaptation.metric import StudyMetric
from fedbn_simulations.adaptation.source_model import SourceModel
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.engines.execute import execute

NUMERICS = 1

ALIGNED = "rotation+population:diversity=1"
"""Alignment, then statistics."""

STREAMS = {"recorded": RECORDED, "turned": WORN}
"""Streams of the unseen people: as recorded, and with the device worn differently during the whole recording."""

THINNED = 12
"""Of so many windows, a quick run has one."""


FEW = {"hapt:unseen=6": "hapt:unseen=2:reserved=24", "watch": "watch:unseen=1:reserved=7"}
"""Scenarios of a quick run: with four seen users, the fewest for a check."""


def source_model(scenario: str, seed: int, quick: bool) -> SourceModel:
    """The federation's network."""
    if quick:
        scenario = FEW[scenario]
    plan = plan_for(scenario, **({"rounds": 1} if quick else {}))
    run = Run(scenario, "global-naive", seed=seed, plan=plan).resolved()
    ctx, outcome = build_context(run), execute(run, "grid:stacked")
    model = copy_model(ctx.load(ctx.assemble(outcome.server.serving, None))).eval()
    return SourceModel(run, model, replace(ctx, population=_thinned(ctx.population)) if quick else ctx)


def _thinned(population: Population) -> Population:
    def thin(user: User) -> User:
        return replace(user, test=user.test.take(torch.arange(0, len(user.test), THINNED)))

    return replace(population, users=tuple(map(thin, population.users)))


def _follow(cell: Cell, source: SourceModel) -> tuple[list[Trace], dict[str, Any]]:
    return run_cell(cell, source)


def _accuracy(source: SourceModel, rule: str, stream: str) -> float:
    """Mean accuracy over unseen users."""
    traces, _ = _follow(Cell(source.run, "unseen", stream, "cold", rule), source)
    return float(np.mean([scores(trace, source.ctx.task)["accuracy"] for trace in traces]))


def phone(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on the later recordings of unseen people with a phone; one network for all arms."""
    source = source_model("hapt:unseen=6", seed, quick)
    return {
        f"accuracy: {name}, {order}": _accuracy(source, rule, stream)
        for name, rule in (("source", SOURCE), ("aligned", ALIGNED))
        for order, stream in STREAMS.items()
    }


def watch(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Accuracies on the second halves of the recordings of unseen people with a watch; one network for all arms."""
    source = source_model("watch", seed, quick)
    chosen = decide(source, "seen", StudyMetric.of(source.ctx.task), _follow, lambda run: source).chosen
    rules = {"source": SOURCE, "aligned": ALIGNED, AUTO: chosen}
    return {f"accuracy: {name}": _accuracy(source, rule, RECORDED) for name, rule in rules.items()}


claim = partial(
    Claim,
    source="proposed by this project, see docs/auto.md",
    published="not a claim of a paper",
    measure="accuracy",
    trained=lambda arm: "federated",
)
with_phones = partial(
    claim,
    setting="HAPT, 24 seen and 6 unseen people, recorded order; har-cnn, strategy global-naive",
    run=phone,
    arms=("source, recorded", "aligned, recorded", "source, turned", "aligned, turned"),
)
with_watches = partial(
    claim,
    setting="watch, 16 arms of 8 seen and 4 arms of 2 unseen people, recorded order; har-cnn, strategy global-naive",
    run=watch,
    arms=("source", "aligned", AUTO),
    threshold=0.0,
)

CLAIMS = (
    with_phones(
        name="alignment-turned",
        sentence="If unseen people wear the phone turned by 45 degrees, alignment with population statistics is more "
        "accurate than the source model.",
        effect=lambda v: v["aligned, turned"] - v["source, turned"],
        meaning="mean accuracy on unseen people with a turned phone, aligned minus source",
        threshold=0.0,
    ),
    with_phones(
        name="alignment-recorded",
        sentence="As recorded, alignment with population statistics loses at most two points of accuracy.",
        effect=lambda v: v["aligned, recorded"] - v["source, recorded"],
        meaning="mean accuracy on unseen people, aligned minus source",
        threshold=-0.02,
    ),
    with_phones(
        name="alignment-equivariance",
        sentence="With alignment, a turn of the phone by 45 degrees costs at most two points of accuracy.",
        effect=lambda v: v["aligned, turned"] - v["aligned, recorded"],
        meaning="mean accuracy on unseen people of the aligned model, turned minus recorded",
        threshold=-0.02,
    ),
    with_watches(
        name="alignment-watch-harm",
        sentence="On a watch, where a posture is no activity, alignment is less accurate than the source model.",
        effect=lambda v: v["source"] - v["aligned"],
        meaning="mean accuracy on unseen people, source minus aligned",
    ),
    with_watches(
        name="alignment-watch-auto",
        sentence="On a watch, the rule that the federation's own check chooses (auto) is not less accurate than the "
        "source model.",
        effect=lambda v: v[AUTO] - v["source"],
        meaning="mean accuracy on unseen people, auto minus source",
    ),
)
