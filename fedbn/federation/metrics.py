"""Cells of the evaluation matrix: accuracy, macro-F1 and loss of a model on a set of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Row = Literal["own", "global", "unseen"]


Column = Literal["aggregated", "recalibrated", "online", "initial", "mean", "pooled", "nearest", "mixture", "prior"]


COLUMNS: tuple[Column, ...] = ("aggregated", "recalibrated", "online")


STARTS: tuple[Column, ...] = ("initial", "mean", "pooled", "nearest", "mixture", "prior")
"""What an unseen user may start from (`fedbn.federation.cold_start`)."""


@dataclass(frozen=True)
class Score:
    """One cell of the matrix for one user.

    Attributes:
        row, column: where in the matrix.
        n: examples tested.
        accuracy: share right.
        macro_f1: unweighted mean of F1 over the classes that occur or are predicted.
        loss: mean cross-entropy, in nats.
    """

    row: Row
    column: Column
    n: int
    accuracy: float
    macro_f1: float
    loss: float


def score(row: Row, column: Column, outputs: Tensor, y: Tensor) -> Score:
    """Score logits ``[n, classes]`` against labels ``[n]``.

    >>> score("own", "aggregated", torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).accuracy
    1.0
    """
    predicted = outputs.argmax(1)
    return Score(
        row,
        column,
        len(y),
        float((predicted == y).double().mean()),
        macro_f1(predicted, y, outputs.shape[1]),
        float(F.cross_entropy(outputs.double(), y)),
    )


def macro_f1(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Unweighted mean of F1 over the classes that occur or are predicted, of class numbers ``[n]`` each.

    scikit-learn's ``f1_score`` gives the same and takes milliseconds to check its input: most of an evaluation of
    thousands of clients.

    >>> macro_f1(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), classes=3)
    0.6666666666666666
    """
    right = torch.bincount(y[predicted == y], minlength=classes)
    met = torch.bincount(y, minlength=classes) + torch.bincount(predicted, minlength=classes)
    return float(_mean_f1(right, met))


def _mean_f1(right: Tensor, met: Tensor) -> Tensor:
    """Mean of F1 over the classes on the last axis, of how often each is right, and how often true or predicted."""
    return (2 * right.double() / met.clamp_min(1)).sum(-1) / (met > 0).sum(-1)


def scores(rows: Sequence[Row], column: Column, outputs: Tensor, y: Tensor, n: Sequence[int]) -> list[Score]:
    """`score` for K users at once, their examples side by side.

    Args:
        rows: in the matrix, one a user.
        column: of all.
        outputs: logits ``[K, B, classes]``.
        y: labels ``[K, B]``.
        n: how many of the B each user has; what stands behind them does not count.

    >>> outputs = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [7.0, 7.0]]])
    >>> [s.accuracy for s in scores(["own", "own"], "aggregated", outputs, torch.tensor([[0, 0], [0, 0]]), [2, 1])]
    [0.5, 1.0]
    """
    k, width, classes = outputs.shape
    many = torch.tensor(n, device=y.device)
    counts = torch.arange(width, device=y.device) < many[:, None]
    predicted = outputs.argmax(2)
    right = (predicted == y) & counts
    first = torch.arange(k, device=y.device)[:, None] * classes

    def count(labels: Tensor, among: Tensor) -> Tensor:
        return torch.bincount((labels + first)[among], minlength=k * classes).view(k, classes)

    met = count(y, counts) + count(predicted, counts)
    f1 = _mean_f1(count(y, right), met)
    losses = F.cross_entropy(outputs.double().flatten(0, 1), y.flatten(), reduction="none").view(k, width)
    loss = torch.where(counts, losses, 0).sum(1) / many
    accuracy = right.sum(1).double() / many
    values = zip(rows, n, accuracy.tolist(), f1.tolist(), loss.tolist(), strict=True)
    return [Score(row, column, *numbers) for row, *numbers in values]
