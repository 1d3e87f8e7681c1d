"""The metric of an adaptation study's tables and figures."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.errors import unknown
from fedbn.tasks import Task


@dataclass(frozen=True)
class StudyMetric:
    """A metric of a task.

    Attributes:
        name: its name.
        higher_is_better: its direction.
        is_share: whether it is a number from 0 to 1.
        of_windows: the metric of single windows, for curves over the stream (`fedbn.tasks.Task.example_metric`).
        higher_in_windows: the direction of that metric.

    >>> from fedbn.tasks import parse_task
    >>> StudyMetric.of(parse_task("regression"), "rmse")
    StudyMetric(name='rmse', higher_is_better=False, is_share=False, of_windows='mae', higher_in_windows=False)
    """

    name: str
    higher_is_better: bool
    is_share: bool
    of_windows: str
    higher_in_windows: bool

    @staticmethod
    def of(task: Task, name: str = "") -> StudyMetric:
        """A metric by its name; the one of single windows if it is empty.

        Raises:
            UserError: the task has no such metric.
        """
        name = name or task.example_metric
        if name not in task.directions:
            raise unknown("metric", name, task.directions)
        is_share = task.metrics_are_shares and name != "loss"
        of_windows = task.example_metric
        return StudyMetric(name, task.directions[name], is_share, of_windows, task.directions[of_windows])
