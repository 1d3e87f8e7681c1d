"""The evaluation matrix: data (rows) by BN statistics (columns).

Rows: *own*, a seen user's later recordings; *global*, the pooled test examples of all seen users with that user's
model; *unseen*, a user who took no part in training. Columns: *aggregated*, statistics as the strategy produces them;
*recalibrated*, statistics measured again on the user's unlabeled training recordings under the final weights;
*online*, statistics that adapt to the user's unlabeled test stream, where each block is predicted before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from fedbn.data.population import Examples
from fedbn.federation.metrics import COLUMNS, Column, Row, Score, score
from fedbn.nn.inference import logits
from fedbn.nn.roles import State, clone, statistics_layers
from fedbn.online import LayerPrior, Rule, follow_rule, predict_online
from fedbn.online.stream import USER
from fedbn.statistics.recalibration import recalibrate
from fedbn.tasks import Task


def evaluate_user(
    model: nn.Module,
    state: State,
    *,
    task: Task,
    calibration: Tensor,
    test: Examples,
    unseen: bool,
    pooled_test: Examples | None,
    columns: tuple[Column, ...] = COLUMNS,
    globally: tuple[Column, ...] = COLUMNS,
    final: bool = True,
    online_prior: float = 256.0,
    online_rule: Rule | None = None,
    prior: Mapping[str, LayerPrior] | None = None,
    predict_stream: Callable[[nn.Module, Tensor], Tensor | None] = lambda model, x: None,
) -> list[Score]:
    """Score all cells of one user.

    Args:
        model: scratch model; left in an undefined state.
        state: the user's model as assembled after aggregation.
        task: the task, which defines the metrics.
        calibration: the user's unlabeled training rows ``[n, *shape]``.
        test: the user's test rows in recorded order.
        unseen: whether the user took no part in training.
        pooled_test: test examples of the global row, or None to omit that row.
        columns: columns to score; columns that need statistics are skipped for a model without any.
        globally: columns of the global row.
        final: whether to compute all metrics (`Task.evaluate`).
        online_prior: weight of the source statistics in the online column, in windows.
        online_rule: rule of the online column, applied window by window; None: blocks with ``online_prior``.
        prior: starting point of ``online_rule``; None: the statistics of ``state``.
        predict_stream: the strategy's hook `fedbn.strategies.base.NormStrategy.predict_stream`; ``online_rule`` takes
            precedence.
    """
    row: Row = "unseen" if unseen else "own"
    stateful = bool(statistics_layers(model))
    saved = clone(state)
    out: list[Score] = []
    for column in columns:
        if column != "aggregated" and not stateful:
            continue
        model.load_state_dict(saved)
        predict: Callable[[Tensor], Tensor] = partial(logits, model)
        if column == "recalibrated":
            recalibrate(model, calibration)
        if column != "online":
            outputs = logits(model, test.x)
        elif online_rule is None:
            streamed = predict_stream(model, test.x)
            outputs = predict_online(model, test.x, prior=online_prior) if streamed is None else streamed
        else:
            outputs, net = follow_rule(model, test.x, online_rule, prior)
            predict = partial(net.predict, user=USER)
        out.append(score(task, row, column, outputs, test.y, final=final))
        if pooled_test is not None and column in globally:
            outputs = predict(pooled_test.x)
            out.append(score(task, "global", column, outputs, pooled_test.y, final=final))
    return out
