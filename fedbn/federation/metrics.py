"""Cells of the evaluation matrix: the metrics of a task for a model on a set of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from fedbn.tasks import Task

Row = Literal["own", "global", "unseen"]

Column = Literal["aggregated", "recalibrated", "online", "initial", "mean", "pooled", "nearest", "mixture", "prior"]

COLUMNS: tuple[Column, ...] = ("aggregated", "recalibrated", "online")

STARTS: tuple[Column, ...] = ("initial", "mean", "pooled", "nearest", "mixture", "prior")
"""Initial statistics of an unseen user (`fedbn.federation.cold_start`)."""


@dataclass(frozen=True)
class Score:
    """One cell of the matrix for one user.

    Attributes:
        row, column: position in the matrix.
        n: number of test examples.
        metrics: value of each metric of the task, with the loss. Undefined metrics are left out.
    """

    row: Row
    column: Column
    n: int
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The cell as one flat table of values."""
        return {"row": self.row, "column": self.column, "n": self.n, **self.metrics}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Score:
        """The inverse of `as_dict`."""
        metrics = {k: v for k, v in values.items() if k not in ("row", "column", "n")}
        return Score(cast(Row, values["row"]), cast(Column, values["column"]), int(values["n"]), metrics)


def score(task: Task, row: Row, column: Column, outputs: Tensor, y: Tensor, *, final: bool = True) -> Score:
    """Score outputs ``[n, *output_shape]`` against targets ``[n, ...]``; ``final`` as in `Task.evaluate`.

    >>> import torch
    >>> from fedbn.tasks import parse_task
    >>> outputs, y = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    >>> score(parse_task("classification"), "own", "aggregated", outputs, y).metrics["accuracy"]
    1.0
    """
    return Score(row, column, len(y), task.evaluate(outputs, y, final=final))


def scores(
    task: Task, rows: Sequence[Row], column: Column, outputs: Tensor, y: Tensor, n: Sequence[int], *, final: bool = True
) -> list[Score]:
    """`score` for K users, padded to the same number of examples.

    Args:
        task: the task.
        rows: row of the matrix for each user.
        column: column of all users.
        outputs: ``[K, B, *output_shape]``.
        y: targets ``[K, B, ...]``.
        n: number of examples of each user; the remaining ones are padding.
        final: as in `Task.evaluate`.
    """
    found = task.evaluate_users(outputs, y, n, final=final)
    return [Score(row, column, size, metrics) for row, size, metrics in zip(rows, n, found, strict=True)]
