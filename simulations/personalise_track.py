"""A study of personalisation as runs of trackers: one for each rule, start and kind of stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from simulations.compare import Task
from simulations.personalise import Results, Study
from simulations.personalise_results import course, label
from simulations.trackers import Tracking

POINTS = 100
"""Points of a curve at most: windows are many, and neighbours alike."""


def tasks(study: Study, out: Path) -> Sequence[Task]:
    """The training runs of a study, under the directories that it reports them by."""
    runs = [study.resolved().run(seed) for seed in range(study.seeds)]
    return [Task(run, str(out / "runs" / run.id)) for run in runs]


def tell(tracking: Tracking, study: Study, results: Results, found: pd.DataFrame) -> None:
    """Tell of each rule its fading accuracy over windows, and with the last one everything of its summary.

    Args:
        tracking: where to.
        study: what was compared.
        results: its cells.
        found: their `simulations.personalise_results.summary`.
    """
    if not tracking.trackers:
        return
    numbers = found.set_index(["stream", "rule"]).select_dtypes("number")
    courses = course(results)
    for cell in {(c.stream, c.start, c.rule): c for c in results}.values():
        here = courses[
            (courses["stream"] == cell.stream) & (courses["start"] == cell.start) & (courses["rule"] == cell.rule)
        ]
        thinned = here.iloc[:: max(1, len(here) // POINTS)]
        points = {int(w): {"fading_accuracy": float(a)} for w, a in zip(thinned["window"], thinned["accuracy"])}
        last = max(points, default=0)
        points[last] = {**points.get(last, {}), **numbers.loc[(cell.stream, label(cell))].to_dict()}
        settings = {
            "scenario": study.scenario,
            "strategy": study.strategy,
            "seeds": study.seeds,
            "stream": cell.stream,
            "start": cell.start,
            "rule": cell.rule,
        }
        tracking.tell(f"{cell.stream}__{cell.start}__{cell.rule}", settings, points)
