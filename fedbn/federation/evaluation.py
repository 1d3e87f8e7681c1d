"""The evaluation matrix: on whose data (rows), with which statistics (columns).

Rows: *own*, a seen user's own later recordings; *global*, the pooled test rows of all seen users with that
user's model; *unseen*, a user who never trained. Columns: *aggregated*, statistics as the strategy leaves
them; *recalibrated*, measured again on the user's own unlabeled training recordings under the final
weights; *online*, following the user's unlabeled test stream, each block predicted before it is used.
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
        calibration: the user's unlabeled training rows ``[n, *shape]``.
        test: the user's test rows in recorded order.
        unseen: whether the user never trained.
        everyone: pooled test rows, or None to leave the global row out.
        columns: which columns; those that need statistics are left out of a model without any.
        globally: the columns of the global row.
        online_prior: weight of the source statistics in the online column, in windows.
        online_rule: followed in the online column instead, window by window.
        prior: what the user then starts from; None: the statistics of ``state``.
        follow: the strategy's own way (`fedbn.strategies.base.NormStrategy.predict_stream`), which ``online_rule``
            overrides.
    """
    row: Row = "unseen" if unseen else "own"
    stateful = bool(statistics_layers(model))
    saved = clone(state)
    out: list[Score] = []
    for column in columns:
        if column != "aggregated" and not stateful:
            continue
        model.load_state_dict(saved)
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
