"""Log an adaptation study to trackers: one run per rule, start and kind of stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedbn_simulations.adaptation.results import group_cells, label, metric_curve, metric_of
from fedbn_simulations.adaptation.study import Results, Study
from fedbn_simulations.experiments.tasks import Task
from fedbn_simulations.tracking.trackers import Tracking

POINTS = 100
"""Maximum number of points of a logged curve."""


def tasks(study: Study, out: Path) -> Sequence[Task]:
    """The training runs of a study with their directories."""
    return [Task(run, str(out / "runs" / run.id)) for run in study.resolved().runs()]


def log_study(tracking: Tracking, study: Study, results: Results, found: pd.DataFrame) -> None:
    """Log each rule's fading metric over windows, and its summary with the last window.

    Args:
        tracking: the trackers.
        study: the study.
        results: its cells.
        found: their `fedbn_simulations.adaptation.results.summary`.
    """
    if not tracking.trackers:
        return
    numbers = found.set_index(["strategy", "stream", "rule"]).select_dtypes("number")
    metric = metric_of(study).of_windows
    curves = metric_curve(results, metric)
    for kind, (cell, *_) in group_cells(results).items():
        curve = curves[(curves[["strategy", "stream", "start", "rule"]] == list(kind)).all(axis=1)]
        thinned = curve.iloc[:: max(1, len(curve) // POINTS)]
        points = {int(w): {f"fading_{metric}": float(a)} for w, a in zip(thinned["window"], thinned[metric])}
        last = max(points, default=0)
        points[last] = {**points.get(last, {}), **numbers.loc[(cell.run.strategy, cell.stream, label(cell))].to_dict()}
        settings = {"scenario": study.scenario, "strategy": cell.run.strategy, "seeds": study.seeds}
        settings |= {"stream": cell.stream, "start": cell.start, "rule": cell.rule}
        trained = f"{cell.run.strategy}__" if len(study.strategies) > 1 else ""
        tracking.log_run(f"{trained}{cell.stream}__{cell.start}__{cell.rule}", settings, points)
