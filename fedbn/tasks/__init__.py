"""Tasks: what a model's outputs mean. A task defines their shape, the loss of an example, and the metrics."""

from fedbn.tasks.base import Task, parse_task, render_task, tasks

__all__ = ["Task", "parse_task", "render_task", "tasks"]
