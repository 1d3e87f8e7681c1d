"""Cells of the evaluation matrix: accuracy, macro-F1 and loss of a model on a set of examples."""

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
"""Initial statistics of an unseen user (`fedbn.federation.cold_start`)."""


@dataclass(frozen=True)
class Score:
    """One cell of the matrix for one user.

    Attributes:
        row, column: position in the matrix.
        n: number of test examples.
        accuracy: share of correct predictions.
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
    accuracy, loss = (predicted == y).double().mean(), F.cross_entropy(outputs.double(), y)
    return Score(row, column, len(y), float(accuracy), macro_f1(predicted, y, outputs.shape[1]), float(loss))


def macro_f1(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Unweighted mean of F1 over the classes that occur or are predicted.

    Equal to scikit-learn's ``f1_score``, whose input checks take milliseconds and would dominate the evaluation of
    thousands of clients.

    Args:
        predicted: predicted classes ``[n]``.
        y: labels ``[n]``.
        classes: number of classes.

    >>> macro_f1(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), classes=3)
    0.6666666666666666
    """
    correct = torch.bincount(y[predicted == y], minlength=classes)
    occurring = torch.bincount(y, minlength=classes) + torch.bincount(predicted, minlength=classes)
    return float(_mean_f1(correct, occurring))


def _mean_f1(correct: Tensor, occurring: Tensor) -> Tensor:
    """Mean F1 over the classes (last axis), from counts of correct predictions and of labels plus predictions."""
    return (2 * correct.double() / occurring.clamp_min(1)).sum(-1) / (occurring > 0).sum(-1)


def scores(rows: Sequence[Row], column: Column, outputs: Tensor, y: Tensor, n: Sequence[int]) -> list[Score]:
    """Vectorized `score` for K users, padded to the same number of examples.

    Args:
        rows: row of the matrix for each user.
        column: column of all users.
        outputs: logits ``[K, B, classes]``.
        y: labels ``[K, B]``.
        n: number of examples of each user; the remaining ones are padding.

    >>> outputs = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [7.0, 7.0]]])
    >>> [s.accuracy for s in scores(["own", "own"], "aggregated", outputs, torch.tensor([[0, 0], [0, 0]]), [2, 1])]
    [0.5, 1.0]
    """
    k, width, classes = outputs.shape
    sizes = torch.tensor(n, device=y.device)
    valid = torch.arange(width, device=y.device) < sizes[:, None]
    predicted = outputs.argmax(2)
    correct = (predicted == y) & valid
    offset = torch.arange(k, device=y.device)[:, None] * classes

    def count(labels: Tensor, mask: Tensor) -> Tensor:
        return torch.bincount((labels + offset)[mask], minlength=k * classes).view(k, classes)

    f1 = _mean_f1(count(y, correct), count(y, valid) + count(predicted, valid))
    losses = F.cross_entropy(outputs.double().flatten(0, 1), y.flatten(), reduction="none").view(k, width)
    loss = torch.where(valid, losses, 0).sum(1) / sizes
    accuracy = correct.sum(1).double() / sizes
    values = zip(rows, n, accuracy.tolist(), f1.tolist(), loss.tolist(), strict=True)
    return [Score(row, column, *numbers) for row, *numbers in values]
