"""Tasks: what a model's outputs mean. A task defines their shape, the loss of an example, and the metrics."""

from fedbn.tasks.base import Task, parse_task, render_task, tasks
from fedbn.tasks.classification import Classification
from fedbn.tasks.multilabel import MultiLabel
from fedbn.tasks.regression import Regression
from fedbn.tasks.segmentation import Segmentation
from fedbn.tasks.sequence import SequenceLabels

__all__ = [
    "Classification",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "SequenceLabels",
    "Task",
    "parse_task",
    "render_task",
    "tasks",
]
