"""A study of personalization as runs of trackers: one for each rule, start and kind of stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from simulations.adaptation.results import accuracy_curve, group_cells, label
from simulations.adaptation.study import Results, Study
from simulations.experiments.tasks import Task
from simulations.tracking.trackers import Tracking

POINTS = 100
"""Points of a curve at most: windows are many, and neighbors alike."""


def tasks(study: Study, out: Path) -> Sequence[Task]:
    """The training runs of a study, under the directories that it reports them by."""
    return [Task(run, str(out / "runs" / run.id)) for run in study.resolved().runs()]


def tell(tracking: Tracking, study: Study, results: Results, found: pd.DataFrame) -> None:
    """Tell of each rule its fading accuracy over windows, and with the last one everything of its summary.

    Args:
        tracking: where to.
        study: what was compared.
        results: its cells.
        found: their `simulations.adaptation.results.summary`.
    """
    if not tracking.trackers:
        return
    numbers = found.set_index(["strategy", "stream", "rule"]).select_dtypes("number")
    curves = accuracy_curve(results)
    for kind, (cell, *_) in group_cells(results).items():
        ctx = curves[(curves[["strategy", "stream", "start", "rule"]] == list(kind)).all(axis=1)]
        thinned = ctx.iloc[:: max(1, len(ctx) // POINTS)]
        points = {int(w): {"fading_accuracy": float(a)} for w, a in zip(thinned["window"], thinned["accuracy"])}
        last = max(points, default=0)
        points[last] = {**points.get(last, {}), **numbers.loc[(cell.run.strategy, cell.stream, label(cell))].to_dict()}
        settings = {
            "scenario": study.scenario,
            "strategy": cell.run.strategy,
            "seeds": study.seeds,
            "stream": cell.stream,
            "start": cell.start,
            "rule": cell.rule,
        }
        trained = f"{cell.run.strategy}__" if len(study.strategies) > 1 else ""
        tracking.tell(f"{trained}{cell.stream}__{cell.start}__{cell.rule}", settings, points)
