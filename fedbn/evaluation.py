"""The evaluation matrix: on whose data (rows), with which statistics (columns).

Rows: *own*, a seen user's own later recordings; *global*, the pooled test rows of all seen users with that
user's model; *unseen*, a user who never trained. Columns: *aggregated*, statistics as the strategy leaves
them; *recalibrated*, measured again on the user's own unlabelled training recordings under the final
weights; *online*, following the user's unlabelled test stream, each block predicted before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbn.online import LayerPrior, Rule, follow_rule, predict_online
from fedbn.online.blocks import USER
from fedbn.recalibration import recalibrate
from fedbn.roles import State, clone, statistics_layers
from fedbn.scenario import Examples
from fedbn.training import logits

Row = Literal["own", "global", "unseen"]
Column = Literal["aggregated", "recalibrated", "online", "initial", "mean", "pooled", "nearest", "mixture", "prior"]
COLUMNS: tuple[Column, ...] = ("aggregated", "recalibrated", "online")
STARTS: tuple[Column, ...] = ("initial", "mean", "pooled", "nearest", "mixture", "prior")
"""What an unseen user may start from (`fedbn.newcomers`)."""


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


def evaluate_user(
    model: nn.Module,
    state: State,
    *,
    calibration: Tensor,
    test: Examples,
    unseen: bool,
    everyone: Examples | None,
    columns: tuple[Column, ...] = COLUMNS,
    globally: tuple[Column, ...] = COLUMNS,
    online_prior: float = 256.0,
    online_rule: Rule | None = None,
    prior: Mapping[str, LayerPrior] | None = None,
    follow: Callable[[nn.Module, Tensor], Tensor | None] = lambda model, x: None,
) -> list[Score]:
    """All cells of one user.

    Args:
        model: scratch model; left in an undefined state.
        state: the user's model as assembled after aggregation.
        calibration: the user's unlabelled training rows ``[n, *shape]``.
        test: the user's test rows in recorded order.
        unseen: whether the user never trained.
        everyone: pooled test rows, or None to leave the global row out.
        columns: which columns; those that need statistics are left out of a model without any.
        globally: the columns of the global row.
        online_prior: weight of the source statistics in the online column, in windows.
        online_rule: followed in the online column instead, window by window.
        prior: what the user then starts from; None: the statistics of ``state``.
        follow: the strategy's own way (`fedbn.strategy.NormStrategy.follow`), which ``online_rule`` overrides.
    """
    row: Row = "unseen" if unseen else "own"
    stateful = bool(statistics_layers(model))
    kept = clone(state)
    out: list[Score] = []
    for column in columns:
        if column != "aggregated" and not stateful:
            continue
        model.load_state_dict(kept)
        answer: Callable[[Tensor], Tensor] = partial(logits, model)
        if column == "online":
            if online_rule is None:
                own = follow(model, test.x)
                outputs = predict_online(model, test.x, prior=online_prior) if own is None else own
            else:
                outputs, net = follow_rule(model, test.x, online_rule, prior)
                answer = partial(net.predict, user=USER)
        else:
            if column == "recalibrated":
                recalibrate(model, calibration)
            outputs = logits(model, test.x)
        out.append(score(row, column, outputs, test.y))
        if everyone is not None and column in globally:
            out.append(score("global", column, answer(everyone.x), everyone.y))
    return out


def pooled_test(parts: list[Examples], rows: int, draw: torch.Generator) -> Examples:
    """At most ``rows`` test rows, drawn without replacement: an equal share from every part.

    Where there are more parts than rows, one row each from as many parts, which are drawn too.

    >>> part = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    >>> [len(pooled_test([part] * n, 4, torch.Generator())) for n in (2, 3, 9)]
    [4, 3, 4]
    """
    if rows < len(parts):
        parts = [parts[i] for i in torch.randperm(len(parts), generator=draw)[:rows].sort().values.tolist()]
    share = max(1, rows // len(parts))
    return Examples.concat([p.take(torch.randperm(len(p), generator=draw)[:share].sort().values) for p in parts])
